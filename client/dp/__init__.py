"""Example-level differential privacy: Poisson sampling and the DP-SGD step."""
