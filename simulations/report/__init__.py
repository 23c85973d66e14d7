"""Self-contained HTML reports of runs, comparisons, sweeps and baselines."""
