"""The engine in this process: requests are handled when their answers are asked for, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from simulations.engines.engine import Answer, Handler, Request
from simulations.engines.sharing import Batch, Cut


class InProcessEngine:
    """Calls a handler.

    One batch of the handler is worked on at a time, and its answers are taken one by one, so that one update is in
    memory and Ctrl-C takes effect at once.

    Args:
        handler: answers.
        cut: how requests become batches; the fewest that the handler takes if not given.
    """

    def __init__(self, handler: Handler, cut: Cut | None = None) -> None:
        self._handler = handler
        self._cut = cut or Cut(handler.most)
        self._queue: deque[Batch] = deque()
        self._running: Iterator[Answer] = iter(())

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self._queue.extend(self._cut.batches(requests))

    def collect(self) -> list[Answer]:
        """Return the next answer, computing it now."""
        found = list(islice(self._running, 1))
        while not found and self._queue:
            self._running = iter(self._handler.handle(self._queue.popleft()))
            found = list(islice(self._running, 1))
        return found

    def close(self) -> None:
        """Forget what is outstanding."""
        self._queue.clear()
        self._running = iter(())
