"""The commands of ``fedtune-server``, one module for each group of them."""
