"""What the coordinator and the sites both speak: config, data, model, adapter, wire, privacy maths."""
