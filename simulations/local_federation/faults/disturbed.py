"""A federation whose processes are killed: its runs, and where each process is found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from client.places import Places
from client.supervise.running import what_runs
from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.errors import RunError
from server.run_place import RunPlace, ask_for_run
from server.state_folder import StateFolder
from server.supervise.service import component_states, running_service
from simulations.benchmarks.tiny_base import TINY_LABELS, TINY_WORDS, save_tiny_base
from simulations.local_federation.commands import WAIT_S
from simulations.local_federation.federation import (
    LocalFederation,
    Say,
    coordinator_up,
    local_coordinator,
    real_sites,
    virtual_nodes,
)
from simulations.local_federation.rows import write_joint_rows, write_site_rows

SITES, ROWS = 2, 36
DEADLINE_S = {"plain": 200.0, "private": 40.0}
"""Seconds that a round has. Without privacy a round needs every site, or it is repeated when it is over; with privacy
it goes on at its deadline with one."""
BUDGET = 900.0
"""ε of each real site: for a few hundred runs."""
_PRIVACY: dict[str, dict[str, Any]] = {
    "plain": {"unit": "none"},
    "private": {
        "unit": "example", "noise_multiplier": 20.0, "delta": 1e-3, "clip_norm": 0.5, "sample_rate": 0.5,
        "accountant": "rdp",
    },
}  # fmt: skip
_LEAST_SITES = {"plain": SITES, "private": 1}


@dataclass
class Disturbed:
    """A federation whose processes are killed.

    Attributes:
        kind: "plain" (no privacy, virtual sites, the same bits every time) or "private" (real sites, ledgers).
        federation: the processes.
        config: of every run, but for its name.
        again: ends what was started in place of what was killed.
    """

    kind: str
    federation: LocalFederation
    config: RunConfig
    again: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def state(self) -> StateFolder:
        """The coordinator's state folder."""
        return StateFolder(self.federation.state)

    @property
    def rounds(self) -> int:
        """Of every run."""
        return self.config.federation.rounds

    @property
    def sites(self) -> dict[str, Places]:
        """Where the files of each site are."""
        return self.federation.places

    def submit(self, name: str) -> RunPlace:
        """Ask for a run, as ``fedtune-server run`` does."""
        return ask_for_run(self.state, self.config.model_copy(update={"name": name}))

    def wait_until_over(self, place: RunPlace) -> str:
        """Wait until a run is over and return how it ended.

        Raises:
            RunError: if it completes no round for too long.
        """
        done, deadline = 0, time.monotonic() + WAIT_S
        while not (submission := place.submission()).over:
            if place.completed_rounds() > done:
                done, deadline = place.completed_rounds(), time.monotonic() + WAIT_S
            if time.monotonic() > deadline:
                raise RunError(f"run {place.name!r} completed no round in {WAIT_S:g} s; expected one.")
            time.sleep(0.2)
        return submission.state

    def component(self, name: str) -> int | None:
        """Return the process id of a component of the coordinator, None while it does not run."""
        entry = component_states(self.state).get(name, {})
        return entry["pid"] if entry.get("running") else None

    def serverapp(self, place: RunPlace) -> int | None:
        """Return the process id of the ServerApp that works on a run, None while there is none."""
        if not place.is_live():
            return None
        pid: int = json.loads((place.path / "lease.json").read_text(encoding="utf-8"))["pid"]
        return pid

    def site_component(self, site: str, name: str) -> int | None:
        """Return the process id of a component of a site, None while it does not run."""
        parts = (what_runs(self.sites[site]) or {}).get("components", {})
        pid: int | None = parts.get(name, {}).get("pid")
        return pid

    def clientapp(self, site: str) -> int | None:
        """Return the process id of a site's ClientApp, None while there is none."""
        executor = self.site_component(site, "executor")
        if executor is not None:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(executor).children():
                    if child.status() != psutil.STATUS_ZOMBIE and any("flwr-clientapp" in p for p in child.cmdline()):
                        return child.pid
        return None

    def kill_coordinator(self, place: RunPlace) -> None:
        """Kill all of the coordinator, the ServerApp included, and start it again."""
        known = running_service(self.state)
        if known is None:
            raise RunError("the coordinator does not run; expected it to.")
        pids = [
            known["service"]["pid"],
            *(part["process"]["pid"] for part in known["components"].values() if part["process"]),
        ]
        pids += [pid for pid in [self.serverapp(place)] if pid is not None]
        for pid in pids:
            kill(pid)
        self.federation.coordinator.wait()
        self.federation.coordinator = self.again.enter_context(coordinator_up(self.federation.folder))

    def kill_site(self, site: str) -> None:
        """Kill all of a site: its supervisor, and with it what it runs."""
        pids = [self.federation.sites[site].pid, self.clientapp(site)]
        pids += [self.site_component(site, name) for name in ("agent", "supernode", "executor")]
        for pid in pids:
            if pid is not None:
                kill(pid)
        self.federation.sites[site].wait()

    def start_site(self, site: str) -> None:
        """Start a site that was killed."""
        self.federation.start_site(site, self.sites[site], self.federation.ups[site], self.again)


def kill(pid: int) -> bool:
    """End a process as a power cut does; False if it had ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def disturbed_federation(kind: str, rounds: int, say: Say) -> Iterator[Disturbed]:
    """Keep a federation of two sites up, on a tiny model, for as long as the context lasts.

    Args:
        kind: "plain" or "private"; see :class:`Disturbed`.
        rounds: of its runs.
        say: is told what happens.
    """
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = _config(folder, kind, rounds)
        files = write_site_rows(config, SITES, folder)
        if kind == "plain":
            write_joint_rows(config, files, folder / "joint.jsonl")
            config = config.model_copy(
                update={"data": config.data.model_copy(update={"train": str(folder / "joint.jsonl")})}
            )
        joined: Callable[[LocalFederation], contextlib.AbstractContextManager[None]] = (
            (lambda up: virtual_nodes(up, files))
            if kind == "plain"
            else (lambda up: real_sites(up, config, files, BUDGET))
        )
        with (
            local_coordinator(folder, "local", say) as federation,
            joined(federation),
            contextlib.ExitStack() as again,
        ):
            yield Disturbed(kind, federation, config, again)


def _config(folder: Path, kind: str, rounds: int) -> RunConfig:
    rows = folder / "rows.jsonl"
    labels = [TINY_LABELS[number % 3] for number in range(ROWS)]
    words = [TINY_WORDS[number % 3 * 3 + number // 3 % 3] for number in range(ROWS)]
    with rows.open("w", encoding="utf-8") as file:
        for number, (label, word) in enumerate(zip(labels, words, strict=True)):
            text = f"{word} since day {number}"
            file.write(json.dumps({"text": text, "label": label, "site": f"site {number % SITES}"}) + "\n")
    values = {
        "name": "undisturbed",
        "model": {"source": str(save_tiny_base(folder / "model"))},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "task": "classification", "train": str(rows), "test": None, "max_length": 24, "labels": list(TINY_LABELS),
            "partition": {"column": "site"},
        },
        "training": {"lr": 0.01, "batch_size": 6},
        "privacy": _PRIVACY[kind],
        "federation": {
            "rounds": rounds, "min_sites": _LEAST_SITES[kind], "round_timeout_s": DEADLINE_S[kind],
        },
        "evaluation": {"enabled": False},
    }  # fmt: skip
    return parse_run_config(json.dumps(values), "faults", None)
