"""Differential privacy for examples and persons: Poisson sampling and the DP-SGD step."""
