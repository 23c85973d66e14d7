"""How requests are shared out among workers: in batches that do not depend on who takes them.

Requests that are submitted together are cut into batches before any worker is looked at: sites that are trained in one
pass are then the same with any engine and any number of workers, and so is every bit of the result. A batch goes where
its first site's rows are tokenised already, if that worker is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from simulations.engines.engine import Request

IN_FLIGHT = 2
"""Batches of a worker: more would hold more updates in memory, fewer would let it wait for the coordinator."""

Batch = list[Request]


@dataclass(frozen=True)
class Cut:
    """How requests that are submitted together are cut into batches.

    Sites are dealt out by the work that each is, the largest first, each to the batch that has the least so far, so
    that workers which take the same number of batches end together.

    Attributes:
        most: most requests of a batch.
        multiple: the number of batches is a multiple of it, as far as each then has two requests or more; 1 where one
            worker takes them all.
        work: of a request, by the number of its node, in any unit; empty where all are alike.
    """

    most: int = 1
    multiple: int = 1
    work: Sequence[float] = ()

    def batches(self, requests: Sequence[Request]) -> list[Batch]:
        """Return the batches; requests keep their order within one."""
        if self.most == 1 or not requests:
            return [[request] for request in requests]
        fewest = -(-len(requests) // self.most)
        count = max(fewest, min(-(-fewest // self.multiple) * self.multiple, len(requests) // 2))
        dealt: list[list[int]] = [[] for _ in range(count)]
        sums = [0.0] * count
        for place in sorted(range(len(requests)), key=lambda place: -self._work(requests[place])):
            free = (number for number in range(count) if len(dealt[number]) < self.most)
            least = min(free, key=lambda number: (sums[number], len(dealt[number])))
            dealt[least].append(place)
            sums[least] += self._work(requests[place])
        return [[requests[place] for place in sorted(places)] for places in dealt]

    def _work(self, request: Request) -> float:
        return self.work[request.node] if self.work else 1.0


class Sharing:
    """One queue a worker; one that is empty takes from the longest.

    Args:
        workers: how many.
        cut: how requests become batches.
    """

    def __init__(self, workers: int, cut: Cut | None = None) -> None:
        self._queues: list[deque[Batch]] = [deque() for _ in range(workers)]
        self._cut = cut or Cut()

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests, each batch for the worker of its first site."""
        for batch in self._cut.batches(requests):
            self._queues[batch[0].node % len(self._queues)].append(batch)

    def put_back(self, worker: int, batches: Sequence[Batch]) -> None:
        """Put batches that were not begun before all others of a worker, in their order."""
        self._queues[worker].extendleft(reversed(batches))

    def batch(self, worker: int, held: int = 0) -> Batch:
        """Take a batch for a worker.

        Args:
            worker: its number.
            held: batches that it has already. The last batches wait for workers that have none.

        Returns:
            The requests; nothing where there is no batch for it.
        """
        if held and len(self) < len(self._queues):
            return []
        queue = self._queues[worker] or max(self._queues, key=len)
        return queue.popleft() if queue else []
