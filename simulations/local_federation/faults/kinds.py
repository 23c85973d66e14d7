"""What is killed: each kind of fault, from a random moment on, with SIGKILL and by process id."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from server.run_place import RunPlace
from simulations.local_federation.faults.disturbed import Disturbed, kill

Strike = Callable[[Disturbed, RunPlace, str], bool]
"""Kills, once what it kills is there; False if the run was over before."""

_POLL_S, _UPLOAD_POLL_S = 0.05, 0.003
_SENDING, _SENT = b"Sending: train message", b"Sent successfully"
_ANSWERED = b"answered a train"


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        what: is killed, for people.
        strike: kills it.
        at_site: whether it is one site's.
        federations: in which it is tried.
    """

    what: str
    strike: Strike
    at_site: bool = False
    federations: tuple[str, ...] = ("plain", "private")


def _there(pid: Callable[[Disturbed, RunPlace, str], int | None]) -> Strike:
    """Kill the process that ``pid`` finds, as soon as there is one."""

    def strike(made: Disturbed, place: RunPlace, site: str) -> bool:
        while not place.submission().over:
            found = pid(made, place, site)
            if found is not None and kill(found):
                return True
            time.sleep(_POLL_S)
        return False

    return strike


def _coordinator(made: Disturbed, place: RunPlace, site: str) -> bool:
    if place.submission().over:
        return False
    made.kill_coordinator(place)
    return True


def _site(made: Disturbed, place: RunPlace, site: str) -> bool:
    if place.submission().over:
        return False
    made.kill_site(site)
    return True


def _upload_of_supernode(made: Disturbed, place: RunPlace, site: str) -> bool:
    """Kill a SuperNode between its first and its last call with an update: it is held to make sure, then killed."""
    log = _Tail(made.sites[site].log("supernode"))
    while not place.submission().over:
        pid = made.site_component(site, "supernode")
        until = time.monotonic() + 1.0  # the submission and the process are looked at again every second
        while pid is not None and time.monotonic() < until:
            if _SENDING in log.read():
                if _held(pid) and _SENT not in log.read().rpartition(_SENDING)[2]:  # an earlier message's may be there
                    return kill(pid)
                _let_go(pid)
                log.skip()
            time.sleep(_UPLOAD_POLL_S)
    return False


def _upload_of_clientapp(made: Disturbed, place: RunPlace, site: str) -> bool:
    """Kill a ClientApp that has the agent's answer and whose SuperNode has not passed it on yet."""
    agent = _Tail(made.sites[site].log("agent"))
    supernode = _Tail(made.sites[site].log("supernode"))
    while not place.submission().over:
        pid = made.clientapp(site)
        until = time.monotonic() + 1.0
        while pid is not None and time.monotonic() < until:
            if _ANSWERED in agent.read():
                if _held(pid) and _SENT not in supernode.read():
                    return kill(pid)
                _let_go(pid)
                agent.skip()
            time.sleep(_UPLOAD_POLL_S)
            supernode.skip()
        if pid is None:
            agent.skip()
            time.sleep(_UPLOAD_POLL_S)
    return False


class _Tail:
    """What was added to a log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0
        self.skip()

    def skip(self) -> None:
        """Begin at what is added from now on."""
        self._start = self._path.stat().st_size

    def read(self) -> bytes:
        """Return what was added."""
        if self._path.stat().st_size <= self._start:
            return b""
        with self._path.open("rb") as file:
            file.seek(self._start)
            return file.read()


def _held(pid: int) -> bool:
    """Stop a process where it is; False if it has ended."""
    try:
        process = psutil.Process(pid)
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(_UPLOAD_POLL_S)
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _let_go(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


FAULTS: dict[str, Fault] = {
    "superlink": Fault("SuperLink", _there(lambda made, place, site: made.component("superlink"))),
    "executor": Fault("executor", _there(lambda made, place, site: made.component("executor"))),
    "serverapp": Fault("ServerApp", _there(lambda made, place, site: made.serverapp(place))),
    "gateway": Fault("gateway", _there(lambda made, place, site: made.component("gateway"))),
    "caretaker": Fault("caretaker", _there(lambda made, place, site: made.component("caretaker"))),
    "everything": Fault("all of the coordinator", _coordinator),
    "agent": Fault("agent", _there(lambda made, place, site: made.site_component(site, "agent")), at_site=True),
    "supernode": Fault(
        "SuperNode", _there(lambda made, place, site: made.site_component(site, "supernode")), at_site=True
    ),
    "clientapp": Fault("ClientApp", _there(lambda made, place, site: made.clientapp(site)), at_site=True),
    "upload-supernode": Fault("SuperNode as its update goes up", _upload_of_supernode, at_site=True),
    "upload-clientapp": Fault("ClientApp as its update goes up", _upload_of_clientapp, at_site=True),
    "site": Fault("all of a site", _site, at_site=True),
}
