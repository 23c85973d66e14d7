"""A SuperLink in memory, a clock, and a process that holds a run's lease as a ServerApp does, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from common.errors import RunError
from server.flower_commands import Flower
from server.state_folder import StateFolder

HOLD = """
import sys
from pathlib import Path
from server.run_place import RunPlace
from server.state_folder import StateFolder
with RunPlace(StateFolder(Path(sys.argv[1])), "tiny").lease(int(sys.argv[2]), 0.0):
    print("held", flush=True)
    sys.stdin.read()
"""


class Link(Flower):
    """What the caretaker asks of Flower, kept in memory; fails where told to."""

    def __init__(self) -> None:
        self.statuses: dict[int, str] = {}
        self.carried: list[Mapping[str, str | int]] = []
        self.registered: list[str] = []
        self.refuses_runs = False
        self.stop_fails: BaseException | None = None
        self.loses_stop = False

    def run(self, app: Path, run_config: Mapping[str, str | int]) -> int:
        if self.refuses_runs:
            raise RunError("flwr run failed; expected success.")
        self.carried.append(run_config)
        self.statuses[len(self.carried)] = "pending"
        return len(self.carried)

    def runs(self) -> dict[int, str]:
        return dict(self.statuses)

    def stop(self, run_id: int) -> None:
        if self.stop_fails is None or self.loses_stop:
            self.statuses[run_id] = "finished:stopped"
        if self.stop_fails is not None:
            raise self.stop_fails

    def register(self, public_key: str, name: str) -> int:
        self.registered.append(name)
        return 1000 + len(self.registered)

    def unregister(self, node_id: int) -> None:
        raise RunError("flwr supernode failed; expected success.")

    def nodes(self) -> dict[int, str]:
        return dict.fromkeys(range(1001, 1001 + len(self.registered)), "online")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 10_000.0

    def __call__(self) -> float:
        return self.now_s


def serverapp(state: StateFolder, fence: int) -> subprocess.Popen[str]:
    """A process that holds the lease of the run as a ServerApp does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state.path), str(fence)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
