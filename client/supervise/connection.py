"""Whether the coordinator answers a site's SuperNode: told by its answers, not by the SuperNode being alive.

Flower's SuperNode tries a closed port, a name that is not found or a 503 again for ever, and lives on. So it notes the
answers that make the coordinator count the site as connected (see :mod:`client.supervise.heartbeats`): the note's text
is the process that was answered, and when it was written is when. It is the SuperNode's own; whoever may look at what
runs may read it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from client.places import Places
from common.errors import RunError

ANSWERED = "answered"
"""Name of the note, in the SuperNode's Flower home."""
HEARD_S = 60.0
"""Seconds that an answer holds: two of Flower's heartbeats, after which the coordinator takes the site for gone."""
CONNECTING_S = 30.0
"""Seconds that a first start has to be answered."""
_NOTE_BYTES = 32


@dataclass(frozen=True)
class Connection:
    """What is known of a running site's connection to the coordinator.

    Attributes:
        state: connecting is for the first seconds of a site alone.
        said: what it is told by.
        answered: when the coordinator last answered the SuperNode that runs, in seconds of the epoch.
    """

    state: Literal["connected", "connecting", "not connected"]
    said: str
    answered: float | None = None


def connection_of(places: Places, running: dict[str, Any] | None) -> Connection | None:
    """Return what is known of a site's connection; None where nothing started with up runs.

    Args:
        places: where the site's files are.
        running: what the supervisor says that it runs.

    Raises:
        RunError: for a user who may not look.
    """
    if running is None:
        return None
    node = running.get("components", {}).get("supernode")
    if node is None:
        return Connection("connecting", "the SuperNode is to be started")
    age_s = None if node["pid"] is None else _age_s(node["pid"])
    answered = None if age_s is None else last_answer(note_of(places), node["pid"])
    if answered is not None:
        since_s = time.time() - answered
        if abs(since_s) <= HEARD_S:  # later than now: the clock was set back
            return Connection("connected", f"last answer {max(0.0, since_s):.0f} s ago", answered)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answered))
        return Connection("not connected", f"no answer since {when}", answered)
    if node["refusal"] is not None:
        return Connection("not connected", f"no connection: {node['refusal']}")
    if node["starts"] == 0:
        return Connection("not connected", "the SuperNode has not started yet")
    again = f"{node['starts']} starts, last exit status {node['last_exit']}"
    if age_s is None:
        return Connection("not connected", f"the SuperNode does not run: {again}")
    if node["starts"] == 1 and age_s < CONNECTING_S:
        return Connection("connecting", f"no answer yet, {age_s:.0f} s after the start")
    why = "" if node["starts"] == 1 else f": {again}"
    return Connection("not connected", f"no answer yet, {age_s:.0f} s after the start{why}")


def note_of(places: Places) -> Path:
    """Return where the SuperNode that up runs notes answers."""
    return places.own_folder("supernode") / "flwr" / ANSWERED


def last_answer(note: Path, pid: int) -> float | None:
    """Return when a process was last answered, in seconds of the epoch; None where it has not been.

    Raises:
        RunError: for a user who may not look.
    """
    try:  # by root, in another user's folder: a link is not followed, and nothing there is waited for
        descriptor = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise RunError(
            f"{note}, which says when the coordinator answered, may not be read by user {os.geteuid()}; expected the "
            "user that starts the site, or root. Give the command as that user."
        ) from None
    except OSError:
        return None
    try:
        said, when = os.read(descriptor, _NOTE_BYTES), os.fstat(descriptor).st_mtime
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return when if said == str(pid).encode() else None


def _age_s(pid: int) -> float | None:
    """Return the seconds that a process has lived; None where it has ended."""
    try:
        return max(0.0, time.time() - psutil.Process(pid).create_time())
    except psutil.Error:
        return None
