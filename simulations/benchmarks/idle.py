"""What the harness itself costs: a round of idle virtual sites that send back what they were sent.

::

    python -m simulations.benchmarks.idle [--sites 1000] [--size-bytes 1000000] [--rounds 5]

Every message goes the whole way that an adapter goes, grid, engine, handler, Flower's ClientApp and back; nothing is
trained, admitted or added up. (Flower's Ray engine was measured at 52 s for a round of 1,000 sites with 1 MB each.)
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import typer
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from common.errors import RunError
from common.flower_records import from_records, to_records
from server.transport import exchange
from simulations.engines.app_handler import AppHandler
from simulations.engines.inprocess import InProcessEngine
from simulations.grid import VirtualGrid

echo = ClientApp()


@echo.train()
def _send_back(message: Message, context: Context) -> Message:
    header, payload = from_records(message.content)
    # A site sends bytes of its own: a copy, as packing an update would be.
    return Message(to_records(header, bytes(memoryview(payload))), reply_to=message)


@dataclass(frozen=True)
class IdleRound:
    """Medians over rounds.

    Attributes:
        wall_s: seconds of a round.
        cpu_s: CPU seconds of this process in it.
        sites: number of virtual sites.
        size_bytes: payload to and from each.
    """

    wall_s: float
    cpu_s: float
    sites: int
    size_bytes: int


def idle_round(sites: int = 1000, size_bytes: int = 1_000_000, rounds: int = 5) -> IdleRound:
    """Time rounds through the grid and the in-process engine, after one that is not timed.

    Raises:
        RunError: if a reply is not what was sent.
    """
    grid = VirtualGrid(InProcessEngine(AppHandler(echo, sites, {})), sites)
    payload = os.urandom(size_bytes)
    found = []
    for number in range(rounds + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        _round(grid, sites, payload, number)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*found[1:], strict=True)
    return IdleRound(median(walls), median(cpus), sites, size_bytes)


def _round(grid: Grid, sites: int, payload: bytes, number: int) -> None:
    messages = {
        str(node): Message(to_records(b"{}", payload), node, MessageType.TRAIN, group_id=str(number))
        for node in grid.get_node_ids()
    }
    came = 0
    for _, reply in exchange(grid, messages, 60.0):
        _, back = from_records(reply.content)
        came += len(back) == len(payload) and back[:64] == payload[:64]
    if came != sites:
        raise RunError(f"{came} of {sites} idle sites sent back what they were sent; expected all.")


def main(
    sites: Annotated[int, typer.Option(min=1)] = 1000,
    size_bytes: Annotated[int, typer.Option(min=64)] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print the seconds of a round."""
    found = idle_round(sites, size_bytes, rounds)
    print(f"{sites} idle sites x {size_bytes:,} bytes: {found.wall_s:.3f} s a round, {found.cpu_s:.3f} s of CPU")


if __name__ == "__main__":
    typer.run(main)
