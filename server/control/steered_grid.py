"""A grid whose calls end with the run, once an operator has stopped it: the round loop calls one every moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid


class SteeredGrid(Grid):
    """Passes everything on to another grid, after a look at whether the run still goes on.

    Args:
        grid: what carries the messages.
        expect_running: raises if the run was stopped.
    """

    def __init__(self, grid: Grid, expect_running: Callable[[], None]) -> None:
        self._grid, self._expect_running = grid, expect_running

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        self._expect_running()
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        self._expect_running()
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        self._expect_running()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        self._expect_running()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on."""
        self._expect_running()
        return self._grid.send_and_receive(messages, timeout=timeout)
