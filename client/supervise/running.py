"""Whether a site runs here, and how it is ended: by the lock that its supervisor holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from client.places import Places
from common.errors import RunError

DOWN_S = 40.0
"""Seconds that a supervisor has to end; it gives its components ``supervisor.STOP_S`` of them."""
KILLED_S = 20.0


@contextmanager
def only_one(places: Places) -> Iterator[None]:
    """Hold the supervisor's lock.

    Raises:
        RunError: if this site runs already.
    """
    places.state.mkdir(mode=0o755, exist_ok=True)
    descriptor = os.open(places.lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor):
            raise RunError(
                f"the site of {places.site_config} runs already (process {_pid(places)}); expected one. Stop it: "
                "fedtune-client down."
            )
        yield
    finally:
        os.close(descriptor)


def what_runs(places: Places) -> dict[str, Any] | None:
    """Return what the supervisor says that it runs; None where there is no supervisor."""
    return _noted(places) if _is_held(places.lock) else None


def end(places: Places, wait_s: float = DOWN_S) -> bool:
    """Ask the supervisor to end, and wait for it; kill it and what it runs if it does not end in time.

    Returns:
        Whether there was one.

    Raises:
        RunError: if even killed it does not end.
    """
    pid = _pid(places)
    if not _is_held(places.lock) or pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    if not _ends(places, wait_s):
        _kill(places, pid)
        if not _ends(places, KILLED_S):
            raise RunError(f"process {pid} does not end; expected it to, killed. Does the system still answer?")
    return True


def _ends(places: Places, wait_s: float) -> bool:
    """Wait until there is no supervisor; return whether that is so in time."""
    deadline = time.monotonic() + wait_s
    while _is_held(places.lock):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _kill(places: Places, pid: int) -> None:
    """Kill a supervisor and the process groups of its components, in which all is that they started."""
    with contextlib.suppress(psutil.Error):
        supervisor = psutil.Process(pid)
        supervisor.suspend()  # so that it starts nothing, and takes no status: its children's numbers stay theirs
        for child in supervisor.children() if _is_held(places.lock) else ():
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        supervisor.kill()


def _noted(places: Places) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads(places.running.read_bytes())
    except (OSError, ValueError):
        return {}
    return noted


def _pid(places: Places) -> int | None:
    pid = _noted(places).get("pid")
    return pid if isinstance(pid, int) else None


def _is_held(lock: Path) -> bool:
    """Whether a live process holds the lock: the system lets go of it when the process ends, however it does."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
