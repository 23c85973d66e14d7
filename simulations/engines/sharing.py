"""How requests are shared out among workers: a site's requests go where its rows are tokenised already."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from simulations.engines.engine import Request

IN_FLIGHT = 2
"""Batches of a worker: more would hold more updates in memory, fewer would let it wait for the coordinator."""


class Sharing:
    """One queue a worker; one that is empty takes from the longest.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self._queues: list[deque[Request]] = [deque() for _ in range(workers)]

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests, each for the worker of its site."""
        for request in requests:
            self._queues[request.node % len(self._queues)].append(request)

    def put_back(self, worker: int, requests: Sequence[Request]) -> None:
        """Put requests that were not begun before all others of a worker, in their order."""
        self._queues[worker].extendleft(reversed(requests))

    def batch(self, worker: int, most: int) -> list[Request]:
        """Take at most ``most`` requests for a worker, and no more than its share of what is left."""
        share = min(most, max(1, len(self) // len(self._queues)))
        taken: list[Request] = []
        while len(taken) < share and len(self):
            queue = self._queues[worker] or max(self._queues, key=len)
            taken.append(queue.popleft())
        return taken
