"""How requests are shared out among workers: in batches that do not depend on who takes them.

Requests that are submitted together are cut into batches in their order, before any worker is looked at: sites that are
trained in one pass are then the same with any engine and any number of workers, and so is every bit of the result.
A batch goes where its first site's rows are tokenised already, if that worker is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from simulations.engines.engine import Request

IN_FLIGHT = 2
"""Batches of a worker: more would hold more updates in memory, fewer would let it wait for the coordinator."""

Batch = list[Request]


def batches_of(requests: Sequence[Request], most: int) -> list[Batch]:
    """Cut requests, in their order, into the fewest batches of at most ``most``, of equal size to within one."""
    count = -(-len(requests) // most)
    bounds = [len(requests) * number // count for number in range(count + 1)] if count else []
    return [list(requests[start:stop]) for start, stop in pairwise(bounds)]


class Sharing:
    """One queue a worker; one that is empty takes from the longest.

    Args:
        workers: how many.
        most: most requests of a batch.
    """

    def __init__(self, workers: int, most: int = 1) -> None:
        self._queues: list[deque[Batch]] = [deque() for _ in range(workers)]
        self._most = most

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests, each batch for the worker of its first site."""
        for batch in batches_of(requests, self._most):
            self._queues[batch[0].node // self._most % len(self._queues)].append(batch)

    def put_back(self, worker: int, batches: Sequence[Batch]) -> None:
        """Put batches that were not begun before all others of a worker, in their order."""
        self._queues[worker].extendleft(reversed(batches))

    def batch(self, worker: int) -> Batch:
        """Take a batch for a worker; nothing where none is left."""
        queue = self._queues[worker] or max(self._queues, key=len)
        return queue.popleft() if queue else []
