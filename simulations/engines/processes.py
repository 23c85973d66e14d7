"""The engine of worker processes, one resident base model each.

At most two batches of a worker's handler are in flight, one computed and one waiting, so that memory does not grow with
the cohort. A request goes to the worker that its site went to before, where the site's rows are tokenised already;
a worker that has nothing left takes from the others.

A worker that dies takes the batch it computed with it: those sites fail with a reason, the batch that waited is given
to another, and a new worker is started. A worker that dies before it has loaded its model ends the run.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable, Sequence

from common.errors import RunError
from simulations.engines.engine import Answer, Request
from simulations.engines.settings import WorkerSettings
from simulations.engines.sharing import IN_FLIGHT, Cut, Sharing
from simulations.engines.worker_process import WorkerProcess

logger = logging.getLogger(__name__)


class ProcessEngine:
    """Spawns workers and shares requests out.

    Args:
        workers: how many.
        settings: of each worker, by its number from 0.
        cut: how requests become batches; one by one if not given.
    """

    def __init__(self, workers: int, settings: Callable[[int], WorkerSettings], cut: Cut | None = None) -> None:
        self._settings = settings
        self._sharing = Sharing(workers, cut)
        self._failed: list[Answer] = []
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        try:
            for number in range(workers):
                self._workers.append(self._start(number))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, each batch for the worker of its first site."""
        self._sharing.add(requests)

    def collect(self) -> list[Answer]:
        """Wait for answers and return those that are there.

        Raises:
            RunError: for a worker that cannot be started.
        """
        while not self._failed and self._outstanding():
            self._share_out()
            found = []
            for key, _ in self._selector.select():
                worker: WorkerProcess = key.data
                try:
                    answer = worker.read()
                except EOFError:
                    self._replace(worker)
                else:
                    found += [] if answer is None else [answer]
            if found:
                return found
        failed, self._failed = self._failed, []
        return failed

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.reap()
        self._workers.clear()
        self._selector.close()

    def _start(self, number: int) -> WorkerProcess:
        worker = WorkerProcess(number + 1, self._settings(number))
        self._selector.register(worker, selectors.EVENT_READ, worker)
        return worker

    def _outstanding(self) -> bool:
        return len(self._sharing) > 0 or any(worker.batches for worker in self._workers)

    def _share_out(self) -> None:
        for depth in range(1, IN_FLIGHT + 1):
            for number, worker in enumerate(self._workers):
                while worker.most and len(worker.batches) < depth:
                    batch = self._sharing.batch(number, held=len(worker.batches))
                    if not batch or not worker.give(batch):
                        break

    def _replace(self, worker: WorkerProcess) -> None:
        self._selector.unregister(worker)
        how = worker.reap()
        if not worker.most:
            raise RunError(
                f"worker {worker.number} of {len(self._workers)} "
                + (
                    f"could not start: {worker.start_failure}"
                    if worker.start_failure
                    else f"{how} before it had loaded the base model; expected it to start. "
                    "See what it printed above; where memory is short, lower --workers."
                )
            )
        lost, waiting = [*worker.batches][:1], [*worker.batches][1:]
        reason = f"worker {worker.number} {how}"
        logger.warning("%s; it is replaced", reason)
        self._failed += [Answer(ticket, failure=reason) for batch in lost for ticket in batch]
        number = worker.number - 1
        self._sharing.put_back(number, [list(batch.values()) for batch in waiting])
        self._workers[number] = self._start(number)
