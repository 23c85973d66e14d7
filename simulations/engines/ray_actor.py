"""What a Ray actor runs: a handler on a resident base model. Its methods take and give bytes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

from simulations.engines.engine import Handler
from simulations.engines.frames import FAILURE, READY, Frame, unpack


class SiteActor:
    """Answers packed requests; Ray makes it on the cluster."""

    def __init__(self) -> None:
        self._handler: Handler | None = None

    def start(self, settings: bytes) -> bytes:
        """Load the base model; return a READY frame with ``most``, or a FAILURE frame with the reason."""
        from common.errors import FedtuneError
        from common.quiet import quiet_dependencies

        quiet_dependencies()
        from simulations.engines.settings import WorkerSettings
        from simulations.engines.site_handler import worker_handler

        try:
            self._handler = worker_handler(WorkerSettings.unpack(settings))
        except FedtuneError as error:
            return Frame(FAILURE, header=str(error).encode()).pack()
        return Frame(READY, ticket=self._handler.most).pack()

    def pid(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()

    def handle(self, requests: Sequence[bytes]) -> list[bytes]:
        """Answer a batch."""
        if self._handler is None:
            return [
                Frame(FAILURE, unpack(data).ticket, header=b"the actor was not started").pack() for data in requests
            ]
        answers = self._handler.handle([unpack(data).request() for data in requests])
        return [Frame.of(answer).pack() for answer in answers]
