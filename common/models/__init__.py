"""The frozen base model, the adapter on it, and the PEFT folder it is exported to."""
