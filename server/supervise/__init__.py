"""Keeping the coordinator's processes and its runs alive, each by itself."""
