"""A grid whose calls end with the run, once an operator has stopped it: the round loop calls one every moment."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp import Grid

from server.forwarding_grid import ForwardingGrid


class SteeredGrid(ForwardingGrid):
    """Passes everything on to another grid, after a look at whether the run still goes on.

    Args:
        grid: what carries the messages.
        expect_running: raises if the run was stopped.
    """

    def __init__(self, grid: Grid, expect_running: Callable[[], None]) -> None:
        super().__init__(grid)
        self._expect_running = expect_running

    def before_call(self) -> None:
        """Look whether the run goes on."""
        self._expect_running()
