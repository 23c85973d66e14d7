"""Notes when the coordinator last let a SuperNode in or took its heartbeat.

These two are what the coordinator counts a site as connected by; an answer to anything else it may give to one that it
takes for gone. A heartbeat is due every 20 s or so, also while a message is worked on for hours.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from client.supervise.connection import ANSWERED
from common.atomic import write_atomic
from common.processes import Retries

logger = logging.getLogger(__name__)


class AnswerNote:
    """The note of the last answer; see :mod:`client.supervise.connection`.

    Args:
        path: of the note.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._retries = Retries(logger)

    def write(self) -> None:
        """Note that the coordinator answered this process now; a full disk ends no heartbeat."""
        with self._retries.tried(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, str(os.getpid()).encode())


def note_answers() -> None:
    """Have a SuperNode that is started in this process later note what it is answered."""
    client: Any = import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    activate, beat = client.ActivateNode, client.SendNodeHeartbeat
    note = AnswerNote(Path(os.environ["FLWR_HOME"]) / ANSWERED)

    def activate_noted(self: Any, request: Any) -> Any:
        answer = activate(self, request)
        note.write()
        return answer

    def beat_noted(self: Any, request: Any) -> Any:
        answer = beat(self, request)
        if answer.success:
            note.write()
        return answer

    client.ActivateNode, client.SendNodeHeartbeat = activate_noted, beat_noted


def keep_beating() -> None:
    """Have a SuperNode that is started in this process later send heartbeats whatever became of the last.

    Flower's stop for good at an answer that it does not expect, such as an error of a busy database: the coordinator
    then takes the SuperNode for gone, which asks it for messages all the while.
    """
    flower: Any = import_module("flwr.supercore.heartbeat")
    beat = flower.HeartbeatSender._heartbeat

    def beat_on(self: Any) -> None:
        try:
            beat(self)
        except flower.HeartbeatFailure:
            raise  # which is tried again
        except Exception as error:  # noqa: BLE001 - whatever it was, the site is still here
            logger.warning("the coordinator did not take a heartbeat (%s); the next follows", type(error).__name__)
            raise flower.HeartbeatFailure from None

    flower.HeartbeatSender._heartbeat = beat_on
