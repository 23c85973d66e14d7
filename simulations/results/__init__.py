"""The tables of docs/results.md, written from runs; run it with make results."""
