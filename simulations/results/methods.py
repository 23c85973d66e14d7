"""Runs every aggregation method on every federation of the grid and writes the tables of ``docs/methods.md``.

::

    python -m simulations.results.methods                 # capped: about an hour and a half of one CPU core
    python -m simulations.results.methods --size full     # all layers, all test rows, 20 rounds

Runs that are complete are not repeated, so that it can be stopped and started again; all of one seed are made before
the next. See :mod:`simulations.results.method_grid` for what is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import one_line_errors
from common.errors import ConfigError
from simulations.commands.options import set_up
from simulations.results.method_grid import ROOT, RUNS, SIZES, cells
from simulations.results.method_tables import read_findings, tables
from simulations.results.page import write_tables
from simulations.study.runs import run_missing, timed

PAGE = ROOT / "docs" / "methods.md"
COMMAND = "python -m simulations.results.methods"
EXAMPLE = "banking77, 3 sites, fedit, no DP"
"""A cell's label."""


def main(
    size: Annotated[str, typer.Option(help="capped or full.")] = "capped",
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Seeds a cell, from 0.")] = 3,
    only: Annotated[str, typer.Option(help="Only cells whose label contains this; then no table is written.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    run: Annotated[bool, typer.Option(help="Run what is missing before writing the tables.")] = True,
    runs: Annotated[Path, typer.Option(help="Where run folders lie.")] = RUNS,
) -> None:
    """Run what is missing and write the tables."""
    set_up(debug=False, threads=threads)
    with one_line_errors(debug=False):
        if size not in SIZES:
            raise ConfigError(f"--size is {size!r}; expected one of {', '.join(SIZES)}.")
        chosen = [cell for cell in cells(size) if only in cell.label]
        if not chosen:
            raise ConfigError(f"--only {only!r} is in no cell's label; expected a part of one such as {EXAMPLE!r}.")
        if run:
            run_missing([cell.run(seed, runs) for seed in range(seeds) for cell in chosen], watching=timed, keep=True)
        if not only:
            write_tables(PAGE, tables(read_findings(size, chosen, range(seeds), runs)), COMMAND)


if __name__ == "__main__":
    typer.run(main)
