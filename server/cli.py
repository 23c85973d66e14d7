"""``fedtune-server``: the command of the coordinator."""

from __future__ import annotations

from typing import Annotated

import typer

from common.console import print_version

app = typer.Typer(
    help=(
        "Coordinate a federation: enrol sites, start runs, watch and steer rounds, export the adapter. "
        "Its commands are not built yet; fedtune-sim runs the same round loop, trainer and wire format today."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    invoke_without_command=True,
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of the program itself."""
    print_version("fedtune-server", version)


def main() -> None:
    """Entry point of ``fedtune-server``."""
    app()
