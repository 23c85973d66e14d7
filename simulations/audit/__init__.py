"""Measuring what a run gives away: canaries, membership attacks, and ε from below beside the claim."""
