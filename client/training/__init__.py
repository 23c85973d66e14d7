"""Local training: the step loop and its optimizers."""
