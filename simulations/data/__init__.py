"""Data sets of the simulation harness and the scripts that make them."""
