"""Options that several commands have, and what every command does first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from common.console import error_console
from common.quiet import quiet_dependencies

Config = Annotated[Path, typer.Argument(help="Run config in YAML; configs/ has some that work.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; repeatable."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads, of each worker where there are several; default: the cores shared out."),
]
Engine = Annotated[
    str, typer.Option(help="What computes the sites: inprocess, processes or ray. It cannot change results.")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes or actors; default: one a GPU, else one a core, at most 8.")
]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster, for engine ray.")]
Cohort = Annotated[
    str, typer.Option(help="Sites trained in one pass: a number, 1 for one by one, or auto for the fastest.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and log in detail.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Seeds, from 0; each is a run of its own.")]


def set_up(debug: bool, threads: int | None) -> None:
    """Quieten the dependencies, set logging up, and set torch's threads where asked."""
    quiet_dependencies()
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=error_console(), show_path=debug, show_time=debug, markup=False)],
    )
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
