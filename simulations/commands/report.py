"""``fedtune-sim report``: a page of what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import one_line_errors
from simulations.commands.options import Debug, set_up


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, comparisons, sweeps or baselines.")],
    debug: Debug = False,
) -> None:
    """Write report.html into each folder: one file with everything in it, that loads nothing from a network."""
    with one_line_errors(debug):
        from simulations.study.extra import expect_extra

        expect_extra("plots", "a report")
        set_up(debug, None)
        from rich.console import Console

        from simulations.report.write import write_report

        for folder in folders:
            Console().print(str(write_report(folder)), markup=False, highlight=False, soft_wrap=True)
