"""Benchmarks of the harness; run them with make bench."""
