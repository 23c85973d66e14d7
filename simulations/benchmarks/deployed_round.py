"""What a round costs where coordinator and sites are real processes, and how often a site loads its base model.

::

    python -m simulations.benchmarks --only deployment

SuperLink, executor, gateway, and two sites with agent, SuperNode and executor, with TLS and node keys, on this machine.
A site trains one step of a tiny model under differential privacy, since real sites take part in nothing else: what is
left of the round is Flower's polls, the starts of its processes, and the way of the bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from client.agent.channel import status_of
from client.places import Places
from client.site_config import load_site_config
from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from server.run_place import find_run
from server.state_folder import StateFolder
from simulations.benchmarks.scale import write_clients
from simulations.benchmarks.tiny_base import TINY_LABELS, save_tiny_base
from simulations.local_federation.commands import short_folder, wait_for
from simulations.local_federation.federation import Say, local_coordinator, real_sites
from simulations.local_federation.rows import write_site_rows

SITES, ROWS = 2, 16
_NO_LIMIT = 1000.0
"""ε that the benchmark does not reach; the largest budget that a site may have."""


@dataclass(frozen=True)
class DeployedRound:
    """What a run took.

    Attributes:
        seconds: of each round after the first, from its requests to its sum.
        cpu_s: CPU seconds of all processes, sites' and coordinator's, in a round.
        bytes_up: of a site's update.
        model_loads: base models that each site's agent has loaded when the run is over.
    """

    seconds: tuple[float, ...]
    cpu_s: float
    bytes_up: int
    model_loads: dict[str, int]

    @property
    def median_s(self) -> float:
        """Median seconds of a round."""
        return median(self.seconds)


def deployed_round(rounds: int = 6, rank: int = 512, say: Say = lambda said: None) -> DeployedRound:
    """Run rounds of two real sites and return what they took; the first, in which models are loaded, is not timed.

    Args:
        rounds: of the run, at least 2.
        rank: of the adapter, which says how large an update is.
        say: is told how it goes.
    """
    with short_folder(None, "deployment") as folder:
        config = _config(folder, rounds, rank)
        files = write_site_rows(config, SITES, folder)
        wanted = folder / "run.yaml"
        wanted.write_text(dump_run_config(config), encoding="utf-8")
        with local_coordinator(folder, "bench", say) as federation, real_sites(federation, config, files, _NO_LIMIT):
            name = federation.submit(wanted)
            place = find_run(StateFolder.open(federation.state), name)
            processes = [federation.coordinator.pid, *(site.pid for site in federation.sites.values())]
            wait_for(lambda: place.completed_rounds() > 0 or place.submission().over, "the first round")
            before = _cpu_seconds(processes)
            wait_for(lambda: place.completed_rounds() == rounds or place.submission().over, "the last round")
            cpu_s = (_cpu_seconds(processes) - before) / (rounds - 1)
            federation.wait_until_over(name)
            loads = {site: _model_loads(rows.parent) for site, rows in files.items()}
        records = list(place.folder.iterate_records("round"))
    return DeployedRound(
        tuple(float(record["seconds"]["total"]) for record in records[1:]),
        cpu_s,
        max(int(site["bytes_up"]) for site in records[-1]["sites"].values()),
        loads,
    )


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU seconds of processes and all their descendants, those that ended included."""
    total = 0.0
    for pid in pids:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(one.cpu_times()[:4])  # user, system, and of children that ended
    return total


def _model_loads(folder: Path) -> int:
    places = Places.beside(folder / "site.yaml")
    return int(status_of(places.socket(load_site_config(places.site_config)), wait_s=60.0)["model_loads"])


def _config(folder: Path, rounds: int, rank: int) -> RunConfig:
    source = folder / "source"
    source.mkdir()
    write_clients(source, SITES, ROWS)
    settings = {
        "name": "deployment",
        "model": {"source": str(save_tiny_base(source / "base")), "dtype": "fp32"},
        "adapter": {"rank": rank, "alpha": rank},
        "data": {
            "task": "classification", "train": str(source / "train.jsonl"), "labels": list(TINY_LABELS),
            "max_length": 32,
        },
        "training": {"lr": 0.01, "batch_size": ROWS // 2, "local_steps": 1},
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.1},
        "federation": {"rounds": rounds, "min_sites": SITES},
        "aggregation": {"method": "fedit", "weights": "uniform"},
        "evaluation": {"enabled": False},
    }  # fmt: skip
    path = source / "run.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return load_run_config(path)
