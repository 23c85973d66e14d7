"""Whether a site runs here, and how it is ended: by the lock that its supervisor holds.

Which process that is, it notes as soon as it has the lock, with when the process was made: a note may be a dead
supervisor's, and its id a stranger's by now. Nothing is signalled but the very process that is noted.
"""

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
from client.supervise.orphans import kill_descendants
from common.atomic import write_atomic
from common.errors import RunError
from common.processes import identity_of, process_of

DOWN_S = 40.0
"""Seconds that a supervisor has to end; it gives its components ``supervisor.STOP_S`` of them."""
KILLED_S = 20.0
NOTED_S = 5.0
"""Seconds that a supervisor which has the lock has to say which process it is."""


@contextmanager
def only_one(places: Places) -> Iterator[None]:
    """Hold the supervisor's lock, and note that this process does.

    Raises:
        RunError: if this site runs already.
    """
    places.state.mkdir(mode=0o755, exist_ok=True)
    descriptor = _opened(places.lock, os.O_CREAT)
    try:
        if not _locked(descriptor):
            raise RunError(
                f"the site of {places.site_config} runs already; expected one. Stop it: fedtune-client down."
            )
        write_atomic(places.running, json.dumps({**identity_of(os.getpid()), "components": {}}, indent=2).encode())
        yield
    finally:
        os.close(descriptor)


def what_runs(places: Places) -> dict[str, Any] | None:
    """Return what the supervisor says that it runs; None where there is no supervisor.

    Raises:
        RunError: for a user who may not look.
    """
    return _noted(places) if _is_held(places.lock) else None


def end(places: Places, wait_s: float = DOWN_S) -> bool:
    """Ask the supervisor to end, and wait for it; kill it and what it runs if it does not end in time.

    Returns:
        Whether there was one.

    Raises:
        RunError: if even killed it does not end, for a user who may not look or end it, or if nothing says which
            process it is.
    """
    supervisor = _supervisor(places)
    if supervisor is None:
        return False
    try:
        supervisor.terminate()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        raise RunError(
            f"process {supervisor.pid}, which runs the site, may not be ended by {_who()}; expected the user that "
            "started it, or root. Give the command as that user."
        ) from None
    if not _ends(places, supervisor, wait_s):
        _kill(places, supervisor)
        if not _ends(places, supervisor, KILLED_S):
            raise RunError(
                f"process {supervisor.pid} does not end; expected it to, killed. Does the system still answer?"
            )
    return True


def _supervisor(places: Places) -> psutil.Process | None:
    """Return the process that holds the lock, None where none does; its predecessor's note may be there for a while.

    Raises:
        RunError: if it does not say which it is.
    """
    deadline = time.monotonic() + NOTED_S
    while _is_held(places.lock):
        supervisor = process_of(_noted(places))
        if supervisor is not None:
            return supervisor
        if time.monotonic() > deadline:
            raise RunError(
                f"{places.running} does not name the process that runs the site; expected it to. End it where it was "
                "started, with Ctrl-C."
            )
        time.sleep(0.1)
    return None


def _ends(places: Places, supervisor: psutil.Process, wait_s: float) -> bool:
    """Wait until a supervisor has let go of the lock, or is gone; return whether that is so in time."""
    deadline = time.monotonic() + wait_s
    while _is_held(places.lock) and supervisor.is_running():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _kill(places: Places, supervisor: psutil.Process) -> None:
    """Kill a supervisor and all that its components started."""
    with contextlib.suppress(psutil.Error):
        supervisor.suspend()  # so that it starts nothing, and takes no status: its children's numbers stay theirs
        if _is_held(places.lock):
            for child in supervisor.children():
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
            kill_descendants(supervisor)
        supervisor.kill()


def _noted(places: Places) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads(places.running.read_bytes())
    except (OSError, ValueError):
        return {}
    return noted


def _is_held(lock: Path) -> bool:
    """Whether a live process holds the lock: the system lets go of it when the process ends, however it does.

    Raises:
        RunError: for a user who may not look.
    """
    try:
        descriptor = _opened(lock)
    except FileNotFoundError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _opened(lock: Path, flags: int = 0) -> int:
    try:
        return os.open(lock, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise RunError(
            f"{lock}, which says whether the site runs, may not be opened by {_who()}; expected the user that "
            "starts the site, or root. Give the command as that user."
        ) from None


def _who() -> str:
    return f"user {os.geteuid()}"


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
