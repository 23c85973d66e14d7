"""Options that several commands have, and how they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

State = Annotated[
    Path,
    typer.Option(envvar="FEDTUNE_COORDINATOR", help="State folder of the coordinator.", show_default=True),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as in its config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Tcp = Annotated[bool, typer.Option("--tcp", help="Over TCP with the operator's certificate; needs control_port.")]

DEFAULT_STATE = Path("coordinator")


def print_json(values: Any) -> None:
    """Print values as JSON."""
    sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def say(*lines: str) -> None:
    """Print lines as they are."""
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
