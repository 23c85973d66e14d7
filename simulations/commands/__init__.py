"""The commands of fedtune-sim by which a person decides."""
