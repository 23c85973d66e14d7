"""``fedtune-client``: the command of a partner site."""

from __future__ import annotations

from common.console import new_app

app = new_app(
    "fedtune-client",
    "Run a partner site: check its data, enforce its policy, keep its privacy ledger, train. "
    "Its commands are not built yet; fedtune-sim runs the same round loop, trainer and wire format today.",
)


def main() -> None:
    """Entry point of ``fedtune-client``."""
    app()
