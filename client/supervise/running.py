"""Whether a site runs here, and how it is ended: by the lock that its supervisor holds."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.places import Places
from common.errors import RunError

DOWN_S = 40.0


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
    """Ask the supervisor to end, and wait for it.

    Returns:
        Whether there was one.

    Raises:
        RunError: if it does not end in time.
    """
    pid = _pid(places)
    if not _is_held(places.lock) or pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + wait_s
    while _is_held(places.lock):
        if time.monotonic() > deadline:
            raise RunError(f"process {pid} does not end; expected it to within {wait_s:g} s. Look at its output.")
        time.sleep(0.1)
    return True


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
