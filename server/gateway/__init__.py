"""The TLS gateway: the only part of the coordinator that the outside can reach, and it shows the fleet API alone."""
