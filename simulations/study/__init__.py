"""Runs with seeds: what is compared, its runs, their curves, intervals and pictures."""
