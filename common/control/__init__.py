"""The control protocol: what an operator and a running ServerApp say to each other (control.proto)."""
