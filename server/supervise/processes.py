"""A process that is started again whenever it ends, later each time it ends early, and ended with all it started."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from server.supervise.components import Component

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0
"""Seconds after which a process counts as steady: when it ends then, it is started again at once."""
END_S = 8.0
LOG_BYTES = 20_000_000
"""Size of a log at which what it holds is put aside, in place of what was put aside before."""


class Supervised:
    """One component.

    Args:
        component: what to run.
        log: file that its output is appended to.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, component: Component, log: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.component = component
        self.restarts = -1
        self._log, self._clock = log, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s, self._due_s, self._began_s = FIRST_PAUSE_S, 0.0, 0.0

    def tend(self) -> bool:
        """Start the process if it does not run and is due; return whether it was started. Its log is kept short."""
        trim_log(self._log)
        now = self._clock()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return False
            steady = now - self._began_s >= STEADY_S
            self._pause_s = FIRST_PAUSE_S if steady else min(LONGEST_PAUSE_S, 2 * self._pause_s)
            self._due_s = now if steady else now + self._pause_s
            logger.warning(
                "%s ended with status %d; starting it again in %.1f s",
                self.component.name, status, self._due_s - now,
            )  # fmt: skip
            self._process = None
        if now < self._due_s:
            return False
        self._start()
        return True

    def identity(self) -> dict[str, Any] | None:
        """Return what tells the process from any other, None while there is none."""
        if self._process is None or self._process.poll() is not None:
            return None
        with contextlib.suppress(psutil.Error):
            return identity_of(self._process.pid)
        return None

    def end(self) -> None:
        """End the process and all that it started."""
        if self._process is not None and self._process.poll() is None:
            end_families([self._process.pid])
            self._process.wait()
        self._process = None

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.component.command, cwd=self.component.folder, env=dict(self.component.environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )  # fmt: skip
        self._began_s = self._clock()
        self.restarts += 1


def trim_log(path: Path) -> None:
    """Move what a log holds to ``.1`` once it is large; the process that appends to it goes on at its start."""
    if not path.exists() or path.stat().st_size <= LOG_BYTES:
        return
    try:
        shutil.copyfile(path, path.with_suffix(".log.1"))
    except OSError as error:  # a full disk, say: the components must not end for it
        logger.warning("%s cannot be put aside and is dropped: %s", path.name, error)
    os.truncate(path, 0)


def identity_of(pid: int) -> dict[str, Any]:
    """Return the id of a process with when it was made: ids are used again."""
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


def is_alive(identity: dict[str, Any] | None) -> bool:
    """Whether the very process that :func:`identity_of` named still runs."""
    if identity is None:
        return False
    try:
        process = psutil.Process(identity["pid"])
        return bool(process.create_time() == identity["created"] and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_families(pids: Iterable[int], seconds: float = END_S) -> None:
    """End processes and their descendants: ask all, then kill by id what is left."""
    family: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            family += [process, *process.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.terminate()
    _, left = psutil.wait_procs(family, timeout=seconds)
    for member in left:
        with contextlib.suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(left, timeout=seconds)
