"""Tests of fedtune-client check."""
