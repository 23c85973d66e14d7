"""What the way to a site's agent costs: a payload there and back over its socket, through the ClientApp's own function.

::

    python -m simulations.benchmarks --only agent

The agent is a process of its own, as at a site; it sends back what it gets, so that the hop alone is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from client.agent.channel import ask
from client.agent.server import AgentServer
from common.errors import RunError
from simulations.benchmarks.measure import Seconds

_START_S = 120.0


class _Echo:
    """What answers in place of a site."""

    def answer(self, kind: str, config: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return header, payload

    def status(self) -> dict[str, Any]:
        return {}


def agent_hop(size_bytes: int = 20_000_000, turns: int = 5) -> Seconds:
    """Return the median seconds of a hop there and back, after one that is not timed, CPU seconds of both ends.

    Args:
        size_bytes: of the payload.
        turns: timed ones.

    Raises:
        RunError: if the agent does not start, or sends back something else.
    """
    payload = os.urandom(size_bytes)
    with tempfile.TemporaryDirectory(prefix="hop") as folder:
        Path(folder).chmod(0o750)
        socket = Path(folder) / "agent.sock"
        process = subprocess.Popen([sys.executable, "-m", "simulations.benchmarks.agent_hop", socket])
        try:
            found = [_seconds(socket, payload, psutil.Process(process.pid)) for _ in range(turns + 1)][1:]
            return Seconds(median(one.wall for one in found), median(one.cpu for one in found))
        finally:
            process.terminate()
            process.wait()


def _seconds(socket: Path, payload: bytes, agent: psutil.Process) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time() + sum(agent.cpu_times()[:2])
    _, back = ask(socket, "train", (b"", b"{}", payload), wait_s=_START_S)
    took = Seconds(time.perf_counter() - wall, time.process_time() + sum(agent.cpu_times()[:2]) - cpu)
    if back != payload:
        raise RunError("the agent sent back other bytes; expected those it got.")
    return took


def main() -> None:
    """Serve at the socket that the command line names, until the process is ended."""
    server = AgentServer(_Echo(), Path(sys.argv[1]))
    server.start()
    server.wait()


if __name__ == "__main__":
    main()
