"""Comparing run configs over seeds: tables, paired differences, pictures."""
