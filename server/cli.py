"""``fedtune-server``: the command of the coordinator."""

from __future__ import annotations

from common.console import new_app

app = new_app(
    "fedtune-server",
    "Coordinate a federation: enrol sites, start runs, watch and steer rounds, export the adapter. "
    "Its commands are not built yet; fedtune-sim runs the same round loop, trainer and wire format today.",
)


def main() -> None:
    """Entry point of ``fedtune-server``."""
    app()
