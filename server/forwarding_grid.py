"""A grid that passes every call on to another one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid


class ForwardingGrid(Grid):
    """Passes everything on; what derives from it changes some of it.

    Args:
        grid: what carries the messages.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def before_call(self) -> None:
        """Called before whatever goes over the wire: nothing here."""

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
        self.before_call()
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        self.before_call()
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        self.before_call()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        self.before_call()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on."""
        self.before_call()
        return self._grid.send_and_receive(messages, timeout=timeout)

    def forget(self, message_ids: Collection[str]) -> None:
        """Say that nobody waits for the replies to some messages any more; passed on to a grid that can be told."""
        if isinstance(self._grid, ForwardingGrid):
            self._grid.forget(message_ids)
