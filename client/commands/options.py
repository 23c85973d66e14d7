"""Options that several commands of ``fedtune-client`` share, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
SiteConfigPath = Annotated[Path, typer.Argument(metavar="SITE_CONFIG", help="Site config in YAML.")]
DEFAULT_SITE = Path("site.yaml")


def show(values: Any, shown: Iterable[Table | str], as_json: bool) -> None:
    """Print values as JSON, or what is shown of them."""
    if as_json:
        sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        return
    console = Console()
    for part in shown:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
