"""One worker process as its engine sees it: started, given batches, read, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from simulations.engines.engine import Answer, Request
from simulations.engines.frames import ANSWER, FAILURE, READY, SETTINGS, Frame, batch_frames, receive_frame, send_frame
from simulations.engines.settings import WorkerSettings

_ROOT = Path(__file__).resolve().parents[2]
_END_S = 5.0
"""A process that closed its socket is given this long to end by itself, so that its own status is known."""


class WorkerProcess:
    """A spawned process with a socket to it.

    Args:
        number: from 1, for messages.
        settings: what it needs to know.

    Attributes:
        most: requests its handler takes at once; 0 until it is ready.
        batches: what it was given and has not answered, oldest first.
    """

    def __init__(self, number: int, settings: WorkerSettings) -> None:
        self.number = number
        self.most = 0
        self.batches: deque[dict[int, Request]] = deque()
        self.start_failure: str | None = None
        self._connection, theirs = socket.socketpair()
        # -P: modules in the working directory must not take the place of ours.
        command = [sys.executable, "-P", "-m", "simulations.engines.worker", str(theirs.fileno())]
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(settings.threads)}
        with theirs:
            # A process group of its own: Ctrl-C is for the parent, which then ends the workers.
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[theirs.fileno()], process_group=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        with suppress(OSError):  # of one that is dead already, which the first read finds
            send_frame(self._connection, Frame(SETTINGS, header=settings.pack()))

    def fileno(self) -> int:
        """Return the socket's file descriptor, for a selector."""
        return self._connection.fileno()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def give(self, requests: Sequence[Request]) -> bool:
        """Send a batch; False if the worker is gone, which the next read finds too."""
        self.batches.append({request.ticket: request for request in requests})
        try:
            for frame in batch_frames(requests):
                send_frame(self._connection, frame)
        except OSError:
            return False
        return True

    def read(self) -> Answer | None:
        """Read one frame; None for one that is no answer.

        Raises:
            EOFError: if the worker is gone.
        """
        try:
            frame = receive_frame(self._connection)
        except OSError:
            raise EOFError from None
        if frame.kind == READY:
            self.most = frame.ticket
        elif frame.kind == FAILURE and not frame.ticket:
            self.start_failure = frame.header.decode()
        elif frame.kind in (ANSWER, FAILURE):
            answer = frame.answer()
            batch = next(batch for batch in self.batches if answer.ticket in batch)
            del batch[answer.ticket]
            if not batch:
                self.batches.remove(batch)
            return answer
        return None

    def kill(self) -> None:
        """End the process without waiting for it; nothing in it is worth keeping."""
        self._connection.close()
        self._process.kill()

    def reap(self) -> str:
        """Wait for the end of a process that was killed or is gone, and say how it ended."""
        self._connection.close()
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
