"""The supervisor: starts a site's components, starts them again for ever, and ends them with all that they started.

- A component that ends is started again after 1, 2, 4, ... 60 seconds; one that lived for a minute begins anew with 1.
- Flower's exit 305 (refused: a certificate or no TLS, a key that is not registered, or a SuperNode that died and is
  still counted as alive for a minute) is tried again every 5 seconds.
- Without an answer (a closed port, a name that is not found, a time-out, 502 to 504) Flower's SuperNode does not end
  but tries again by itself, for ever: that it runs does not say that it is connected; see
  :mod:`client.supervise.connection`.
- What the system refuses, as on a full disk or where no process can be made, is said once and tried again: only being
  told to ends the supervisor.
- Where the supervisor is killed, the system ends its components with it (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.supervise.components import Component
from client.supervise.orphans import Orphans
from common.atomic import write_atomic
from common.processes import Retries, identity_of, trim_log

logger = logging.getLogger(__name__)

FIRST_S, MOST_S, LIVED_S = 1.0, 60.0, 60.0
REFUSED_S = 5.0
STOP_S = 15.0
"""Seconds that a component has to end after SIGTERM, before SIGKILL."""
LARGEST_LOG = 10_000_000
_REFUSED = b"Exit Code: 305"
_BEFORE_REASON = b"Failed to initialize the connection to the SuperLink."
_REASON_LENGTH = 160
_LOG_EVERY_S = 60.0
_PR_SET_PDEATHSIG = 1


def pause_before(restart: int, refused: bool) -> float:
    """Return the seconds to wait before a component is started again.

    Args:
        restart: how often in a row it ended early, from 1.
        refused: whether the SuperLink refused it.
    """
    return REFUSED_S if refused else min(MOST_S, FIRST_S * 2.0 ** min(restart - 1, 30))


@dataclass
class _Kept:
    """A component under supervision."""

    component: Component
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    early: int = 0
    starts: int = 0
    last_exit: int | None = None
    refusal: str | None = None
    log_start: int = 0
    left: bool = False


class Supervisor:
    """Runs components until it is told to end.

    Args:
        components: what to run, in this order.
        note: file that says what runs; see :meth:`report`.
    """

    def __init__(self, components: Sequence[Component], note: Path) -> None:
        self._kept = [_Kept(component) for component in components]
        self._note = note
        self._noted: dict[str, Any] = {}
        self._retries = Retries(logger)
        self._orphans = Orphans()

    def run(self, ended: threading.Event) -> None:
        """Keep the components running until ``ended`` is set; then end them.

        Call it from the main thread. What else this process starts meanwhile is taken for a component's and killed.
        """
        logs_due = time.monotonic() + _LOG_EVERY_S
        with self._orphans:
            try:
                while not ended.wait(0.2):
                    for kept in self._kept:
                        with self._retries.tried(kept.component.name):
                            self._look_after(kept)
                    self._orphans.take_ended(self._living())
                    if time.monotonic() >= logs_due:
                        logs_due = time.monotonic() + _LOG_EVERY_S
                        for kept in self._kept:
                            with self._retries.tried(str(kept.component.log)):
                                trim_log(kept.component.log, LARGEST_LOG)
                    self._write()
            finally:
                self._end()

    def report(self) -> dict[str, Any]:
        """Return what runs, by component."""
        return {
            **identity_of(os.getpid()),
            "components": {
                kept.component.name: {
                    "pid": kept.process.pid if kept.process is not None else None,
                    "user": kept.component.user,
                    "starts": kept.starts,
                    "last_exit": kept.last_exit,
                    "refusal": kept.refusal,
                }
                for kept in self._kept
            },
        }

    def _living(self) -> list[int]:
        return [kept.process.pid for kept in self._kept if kept.process is not None]

    def _look_after(self, kept: _Kept) -> None:
        now = time.monotonic()
        if kept.process is None:
            if now >= kept.due:
                self._start(kept)
            return
        status = kept.process.poll()
        if status is None:
            if kept.refusal is not None and now - kept.started > LIVED_S:
                kept.refusal = None
            return
        kept.process, kept.last_exit, kept.refusal, kept.left = None, status, None, True
        with self._retries.tried(str(kept.component.log)):
            kept.refusal = refusal_in(_since(kept.component.log, kept.log_start))
        kept.early = 1 if now - kept.started >= LIVED_S else kept.early + 1
        wait = pause_before(kept.early, kept.refusal is not None)
        kept.due = now + wait
        why = f"exit status {status}" if kept.refusal is None else f"no connection to the coordinator: {kept.refusal}"
        logger.warning("%s ended: %s; again in %.0f s", kept.component.name, why, wait)

    def _start(self, kept: _Kept) -> None:
        component = kept.component
        if kept.left:  # not as soon as it ended: what cleans up behind it had a second
            self._orphans.kill(self._living())
            kept.left = False
        component.log.parent.mkdir(parents=True, exist_ok=True)
        kept.log_start = component.log.stat().st_size if component.log.exists() else 0
        with component.log.open("ab") as log:
            kept.process = subprocess.Popen(
                component.command, cwd=component.folder, env=component.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, umask=0o027,
                preexec_fn=_end_with_us(os.getpid()), **_identity(component.user),
            )  # fmt: skip
        kept.started, kept.starts = time.monotonic(), kept.starts + 1
        logger.info("%s started, process %d", component.name, kept.process.pid)

    def _end(self) -> None:
        """End all components and what they started: ask each, wait, and kill what is left.

        A component leads a process group. Its end is seen without taking its status at first: for as long as that is
        not taken, the group's number is nobody else's. The executor leaves its ClientApps behind when it ends. What
        left its group is an orphan by then.
        """
        living = [(kept, kept.process) for kept in self._kept if kept.process is not None]
        for _, process in reversed(living):
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for kept, process in living:
            while not _has_ended(process) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not _has_ended(process):
                logger.warning("%s does not end; it is killed", kept.component.name)
            # macOS refuses where nobody but the ended leader is there.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            kept.last_exit, kept.process = process.wait(), None
        self._orphans.kill(())
        self._write()

    def _write(self) -> None:
        report = self.report()
        if report != self._noted:
            with self._retries.tried(str(self._note)):
                write_atomic(self._note, json.dumps(report, indent=2).encode())
                self._noted = report


def refusal_in(log: bytes) -> str | None:
    """Return why a SuperNode was not let in, in the words of its log; None where that was not what ended it."""
    if _REFUSED not in log:
        return None
    lines = log.partition(_BEFORE_REASON)[2].decode("utf-8", "replace").splitlines()
    reason = "".join(character for character in "".join(lines[1:2]) if character.isprintable())
    return reason[:_REASON_LENGTH] or "refused"


def _since(log: Path, start: int) -> bytes:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 65536))
        return file.read()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if not _has_ended(process):
        process.send_signal(number)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended, whose status is left to be taken."""
    if process.returncode is not None or not hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _identity(user: str | None) -> dict[str, Any]:
    """Whom a process runs as: a user with their own group and no other."""
    if user is None:
        return {}
    import pwd

    try:
        found = pwd.getpwnam(user)
    except KeyError:  # also where a directory of users does not answer now
        raise OSError(f"user {user!r} is not known to the system") from None
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": ()}


def _end_with_us(parent: int) -> Callable[[], None] | None:
    """What a new process does before its program starts: have the system end it when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
