"""Cohort batching: several virtual sites trained in one forward and backward pass, each with its own adapter."""
