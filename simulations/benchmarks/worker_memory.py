"""What worker processes hold in memory, and how much of it they share.

::

    python -m simulations.benchmarks.worker_memory CONFIG.yaml [--workers 2]

Each worker answers one training message of every site in turn, then Linux says of each process: RSS, all pages it sees;
PSS, shared pages divided by those who share them; and of the pages of the base model's weights, how many are its own. A
worker more costs its PSS, not its RSS.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from common.quiet import quiet_dependencies

MIB = 2**20


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of one worker, in MiB.

    Attributes:
        rss: resident set.
        pss: proportional set.
        weights: pages of the weights' file that it has mapped and touched.
        weights_own: those of them that are private copies.
    """

    rss: float
    pss: float
    weights: float
    weights_own: float


def memory_of(pid: int, weights: Path) -> WorkerMemory:
    """Read the memory of a process; Linux only."""
    import psutil

    process = psutil.Process(pid)
    whole = process.memory_full_info()
    maps = [entry for entry in process.memory_maps(grouped=False) if entry.path == str(weights.resolve())]
    mapped, own = (sum(getattr(entry, kind) for entry in maps) for kind in ("rss", "private_dirty"))
    return WorkerMemory(*(round(value / MIB, 1) for value in (whole.rss, whole.pss, mapped, own)))


def main(config: Path, workers: Annotated[int, typer.Option(min=1)] = 2) -> None:
    """Print one line of JSON a worker."""
    quiet_dependencies()
    from common.config.load import dump_run_config, load_run_config
    from common.data.federated import load_federated_data
    from common.models.folder import model_folder
    from common.wire import DescribeRequest, header_bytes
    from simulations.engines.engine import Request
    from simulations.engines.processes import ProcessEngine
    from simulations.engines.settings import WorkerSettings

    settings = load_run_config(config, [])
    sites = len(load_federated_data(settings.data, settings.seed).sites)
    header = header_bytes(DescribeRequest(config_digest=settings.digest()))
    each = WorkerSettings(dump_run_config(settings), sites, "cpu", 1, logging.WARNING)
    with closing(ProcessEngine(workers, lambda _: each)) as engine:
        engine.submit([Request(1 + node, node, "query", header, b"") for node in range(sites)])
        answered = 0
        while answered < sites:
            answered += len(engine.collect())
        weights = model_folder(settings.model) / "model.safetensors"
        for pid in engine.pids:
            print(json.dumps(asdict(memory_of(pid, weights))))


if __name__ == "__main__":
    typer.run(main)
