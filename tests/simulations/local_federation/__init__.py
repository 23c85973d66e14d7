"""Tests of simulations/local_federation/."""
