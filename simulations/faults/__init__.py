"""Faults and time in a simulation: who is there, how long things take, who is hostile."""
