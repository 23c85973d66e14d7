"""``fedtune-server up``: the coordinator's processes in the foreground, until Ctrl-C or SIGTERM ends them all."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import psutil

from common.atomic import write_atomic
from common.errors import ConfigError
from common.processes import Retries, identity_of, is_alive
from server.state_folder import StateFolder, locked
from server.supervise.components import coordinator_components
from server.supervise.processes import Supervised, end_families

logger = logging.getLogger(__name__)

POLL_S = 0.5
STOP_WAIT_S = 60.0
"""Seconds that a coordinator has to end by itself before it is killed, and its processes with it."""


def serve(state: StateFolder, only: Sequence[str] = (), started: Callable[[], None] = lambda: None) -> None:
    """Keep the components alive until SIGTERM or SIGINT, then end them and all that they started.

    Nothing else ends it: what the system refuses is tried again.

    Args:
        state: the state folder.
        only: components to run; all if empty.
        started: called when all of them were started.

    Raises:
        RunError: if the coordinator is up already.
        ConfigError: for a component that there is not.
    """
    known = coordinator_components(state, state.config())
    for name in only:
        if name not in known:
            raise ConfigError(f"component {name!r} is unknown; expected one of {', '.join(known)}.")
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    with locked(state.path / "up.lock", wait=False, what=f"the coordinator in {state.path}"):
        _end_left_over(state)
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        running = {name: Supervised(known[name], state.log(name)) for name in only or known}
        retries = Retries(logger)
        try:
            noted = announced = False
            while not ended.is_set():
                for name, supervised in running.items():
                    with retries.tried(name):
                        noted = not supervised.tend() and noted
                if not noted:
                    with retries.tried(str(state.up)):
                        _write(state, running)
                        noted = True
                if not announced and all(supervised.restarts >= 0 for supervised in running.values()):
                    started()
                    announced = True
                ended.wait(POLL_S)
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
            for supervised in reversed(running.values()):
                supervised.end()
            state.up.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def running_service(state: StateFolder) -> dict[str, Any] | None:
    """Return what :func:`serve` wrote down, None where it does not run."""
    known = _read(state)
    return known if known is not None and is_alive(known["service"]) else None


def stop_service(state: StateFolder, wait_s: float = STOP_WAIT_S) -> bool:
    """End a running coordinator, by force if it does not end in time; return False if there is none."""
    known = running_service(state)
    if known is None:
        _end_left_over(state)
        return False
    try:
        process = psutil.Process(known["service"]["pid"])
        process.terminate()
        if not _ends(process, wait_s):
            logger.warning("the coordinator does not end; it is killed")
            process.kill()
            _ends(process, wait_s)
    except psutil.NoSuchProcess:
        pass
    _end_left_over(state)
    return True


def _ends(process: psutil.Process, wait_s: float) -> bool:
    """Wait until a process has ended, also one whose status its parent never takes; return whether it has in time."""
    deadline = time.monotonic() + wait_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def component_states(state: StateFolder) -> dict[str, dict[str, Any]]:
    """Return of each component whether it runs, its process id and how often it was started again."""
    known = running_service(state)
    listed = {} if known is None else known["components"]
    return {
        name: {
            "running": is_alive(entry["process"]),
            "pid": entry["process"]["pid"] if entry["process"] else None,
            "restarts": entry["restarts"],
        }
        for name, entry in listed.items()
    }


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody answers on a port."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _write(state: StateFolder, running: dict[str, Supervised]) -> None:
    entries = {name: {"process": s.identity(), "restarts": s.restarts} for name, s in running.items()}
    values = {"service": identity_of(os.getpid()), "components": entries}
    write_atomic(state.up, (json.dumps(values, indent=2) + "\n").encode())


def _read(state: StateFolder) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(state.up.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return known


def _end_left_over(state: StateFolder) -> None:
    """End components that outlived the service that started them, as they do when it was killed."""
    known = _read(state)
    if known is None or is_alive(known["service"]):
        return
    left = [entry["process"]["pid"] for entry in known["components"].values() if is_alive(entry["process"])]
    if left:
        logger.warning("ending %d processes that an earlier coordinator left", len(left))
        end_families(left)
    state.up.unlink(missing_ok=True)
