"""Searching settings with Optuna, and what the search costs in privacy."""
