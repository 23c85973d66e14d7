"""Whether memory grows with the number of virtual clients: the same run with few and with many, each in a new process.

::

    python -m simulations.benchmarks.scale                     # 100 and 10,000 clients, 100 a round, 20 rounds
    python -m simulations.benchmarks.scale --many 2000 --rounds 3

A client has the same few rows whatever their number, and a round asks the same number of clients, so that the work of
the rounds is the same. What differs is what a simulation holds for clients it knows of.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from common.quiet import quiet_dependencies

quiet_dependencies()

from common.config.load import load_run_config  # noqa: E402
from common.config.run import RunConfig  # noqa: E402
from common.errors import RunError  # noqa: E402
from server.events import Observer  # noqa: E402
from simulations.benchmarks.memory import MIB, peak_bytes, resident_bytes  # noqa: E402
from simulations.benchmarks.tiny_base import TINY_LABELS, TINY_WORDS, save_tiny_base  # noqa: E402

_MODULE = "simulations.benchmarks.scale"
TEST_ROWS = 1
"""Test rows of a client."""


def main(
    few: Annotated[int, typer.Option(min=2, help="Clients of the first run.")] = 100,
    many: Annotated[int, typer.Option(min=2, help="Clients of the second run.")] = 10_000,
    sampled: Annotated[int, typer.Option(min=2, help="Clients a round, in both.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Training rows of a client.")] = 8,
    base: Annotated[str, typer.Option(help="Base model; without one a tiny BERT, where the rest shows most.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run config.")] = None,
) -> None:
    """Measure both and print the peak memory of each and their ratio."""
    figures = compare_scale((few, many), sampled, rounds, rows, base, overrides or ())
    for figure in figures:
        print(json.dumps(figure))
    print(
        f"peak memory with {many} clients is {figures[1]['peak_mib'] / figures[0]['peak_mib']:.3f} of that with {few}"
    )


def compare_scale(
    clients: Sequence[int], sampled: int, rounds: int, rows: int, base: str = "", overrides: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run with each number of clients in a process of its own and return what was measured.

    Args:
        clients: numbers of clients.
        sampled: clients a round.
        rounds: rounds.
        rows: training rows of a client.
        base: base model source; a tiny BERT if empty.
        overrides: ``section.key=value`` strings.

    Returns:
        For each: clients, resident MiB when the first round began, peak MiB, CPU seconds before it and in all.

    Raises:
        RunError: if a process fails.
    """
    found = []
    for count in clients:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = base or str(save_tiny_base(folder / "base"))
            write_clients(folder, count, rows)
            config = folder / "scale.yaml"
            config.write_text(json.dumps(_settings(source, min(sampled, count), rounds)), encoding="utf-8")
            command = [sys.executable, "-m", _MODULE, "--child", str(config), *overrides]
            environment = os.environ | {"FEDTUNE_CACHE": str(folder / "cache")}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RunError(f"a scale benchmark ended with status {done.returncode} ({last[:200]}); expected 0.")
        found.append({"clients": count} | json.loads(done.stdout.splitlines()[-1]))
    return found


def write_clients(folder: Path, clients: int, rows: int) -> None:
    """Write train.jsonl and test.jsonl: short texts whose label follows from a word."""
    for part, each in (("train", rows), ("test", TEST_ROWS)):
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(clients * each):
                label = TINY_LABELS[index % len(TINY_LABELS)]
                word = TINY_WORDS[(7 * index) % len(TINY_WORDS)]
                text = f"{label} {word} since day {index % 97} and {word} again on day {index % 89}"
                site = f"client {index % clients:05d}"
                file.write(json.dumps({"text": text, "label": label, "site": site}) + "\n")


def _settings(source: str, sampled: int, rounds: int) -> dict[str, Any]:
    return {
        "name": "scale",
        "model": {"source": source, "dtype": "fp32"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {
            "task": "classification", "train": "train.jsonl", "test": "test.jsonl", "labels": list(TINY_LABELS),
            "max_length": 32,
        },
        "training": {"lr": 0.01, "batch_size": 8, "local_steps": 1},
        "privacy": {"unit": "none"},
        "federation": {"rounds": rounds, "sites_per_round": sampled},
        "evaluation": {"every": 5},
    }  # fmt: skip


class _AtFirstRound(Observer):
    """Notes memory and CPU seconds when the first round begins."""

    def __init__(self) -> None:
        self.resident = 0
        self.cpu_s = 0.0

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        if number == 1:
            self.resident, self.cpu_s = resident_bytes(), time.process_time()


def _measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    import torch

    from simulations.run import simulate

    torch.set_num_threads(1)
    seen = _AtFirstRound()
    simulate(config, folder / "run", observer=seen)
    return {
        "first_round_mib": round(seen.resident / MIB, 1),
        "peak_mib": round(peak_bytes() / MIB, 1),
        "set_up_cpu_s": round(seen.cpu_s, 2),
        "cpu_s": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        path = Path(sys.argv[2])
        print(json.dumps(_measure(load_run_config(path, sys.argv[3:]), path.parent)))
    else:
        typer.run(main)
