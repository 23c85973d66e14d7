"""Processes of a federation killed in the middle of runs, and what must hold afterwards."""
