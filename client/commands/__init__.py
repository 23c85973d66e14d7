"""The commands of ``fedtune-client``, one module for what belongs together."""
