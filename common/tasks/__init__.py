"""The tasks a model can be tuned for: how a row is tokenised, its loss and its metrics."""
