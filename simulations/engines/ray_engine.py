"""The engine of Ray actors, one resident base model each: several GPUs, several machines, an existing cluster.

As with worker processes, two batches of an actor are in flight; an actor that dies takes the batch it computed with it
and is replaced, and one that cannot start ends the run. Nodes of a cluster need fedtune installed, and the run config's
files at the same paths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from common.errors import RunError
from simulations.engines.engine import Answer, Request
from simulations.engines.frames import FAILURE, Frame, unpack
from simulations.engines.ray_actor import SiteActor
from simulations.engines.ray_cluster import RayCluster
from simulations.engines.settings import WorkerSettings
from simulations.engines.sharing import IN_FLIGHT, Cut, Sharing

logger = logging.getLogger(__name__)


@dataclass
class _Actor:
    """An actor: its handle, the reference to its start, and its batches by reference, oldest first."""

    handle: Any
    starting: Any
    most: int = 0
    batches: dict[Any, list[Request]] = field(default_factory=dict)


class RayEngine:
    """Makes actors and shares requests out.

    Args:
        workers: how many actors.
        settings: of each, by its number from 0.
        threads: CPU threads of each.
        address: of an existing cluster; None for one of its own.
        cut: how requests become batches; one by one if not given.

    Raises:
        ConfigError: without Ray, or for a cluster that does not fit.
    """

    def __init__(
        self, workers: int, settings: Callable[[int], WorkerSettings], threads: int, address: str | None = None,
        cut: Cut | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._sharing = Sharing(workers, cut)
        self._failed: list[Answer] = []
        self._actors: list[_Actor] = []
        self._open = True
        self._cluster = RayCluster(address, workers, threads)
        self._ray = self._cluster.ray
        try:
            self._actors += [self._start(number) for number in range(workers)]
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the actors, on their machines; waits until they are there."""
        found: list[int] = self._ray.get([actor.handle.pid.remote() for actor in self._actors])
        return found

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, each batch for the actor of its first site."""
        self._sharing.add(requests)

    def collect(self) -> list[Answer]:
        """Wait for answers and return those that are there.

        Raises:
            RunError: for an actor that cannot be started.
        """
        while not self._failed and (len(self._sharing) or any(actor.batches for actor in self._actors)):
            self._share_out()
            owners = {ref: number for number, actor in enumerate(self._actors) for ref in self._references(actor)}
            done, _ = self._ray.wait(list(owners), num_returns=1)
            found = self._take(owners[done[0]], done[0])
            if found:
                return found
        failed, self._failed = self._failed, []
        return failed

    def close(self) -> None:
        """Kill the actors and leave the cluster; one of our own ends."""
        if not self._open:
            return
        self._open = False
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor.handle)
        self._actors.clear()
        self._cluster.close()

    def _start(self, number: int) -> _Actor:
        remote = self._ray.remote(num_cpus=1, num_gpus=self._cluster.gpus_each, max_restarts=0)(SiteActor)
        handle = remote.remote()
        return _Actor(handle, handle.start.remote(self._settings(number).pack()))

    def _references(self, actor: _Actor) -> list[Any]:
        return list(actor.batches) if actor.most else [actor.starting]

    def _share_out(self) -> None:
        for depth in range(1, IN_FLIGHT + 1):
            for number, actor in enumerate(self._actors):
                while actor.most and len(actor.batches) < depth:
                    batch = self._sharing.batch(number, held=len(actor.batches))
                    if not batch:
                        break
                    reference = actor.handle.handle.remote([Frame.of(request).pack() for request in batch])
                    actor.batches[reference] = batch

    def _take(self, number: int, reference: Any) -> list[Answer]:
        actor = self._actors[number]
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._replace(number, type(error).__name__)
            return []
        if not actor.most:
            frame = unpack(result)
            if frame.kind == FAILURE:
                raise RunError(f"Ray actor {number + 1} could not start: {frame.header.decode()}")
            actor.most = frame.ticket
            return []
        del actor.batches[reference]
        return [unpack(data).answer() for data in result]

    def _replace(self, number: int, how: str) -> None:
        actor = self._actors[number]
        if not actor.most:
            raise RunError(
                f"Ray actor {number + 1} of {len(self._actors)} ended ({how}) before it had loaded the base model; "
                "expected it to start. Where memory is short, lower --workers."
            )
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)
        lost, waiting = [*actor.batches.values()][:1], [*actor.batches.values()][1:]
        reason = f"Ray actor {number + 1} ended ({how})"
        logger.warning("%s; it is replaced", reason)
        self._failed += [Answer(request.ticket, failure=reason) for batch in lost for request in batch]
        self._sharing.put_back(number, waiting)
        self._actors[number] = self._start(number)
