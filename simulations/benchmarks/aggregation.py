"""What aggregation costs: each method in factored form, and the dense way, each in a process of its own.

::

    python -m simulations.benchmarks.aggregation                        every method, one layer
    python -m simulations.benchmarks.aggregation --layers 64 --no-dense as many layers as a large model has
    python -m simulations.benchmarks --only aggregation                 both, as lines of make bench

The round is synthetic: so many sites with normal factors of one rank on square layers. Seconds are those of adding all
updates and making the next adapter, CPU and wall; memory is what the process grew by over the updates themselves, which
a coordinator holds anyway for methods that gather. "Measure" is what the error, cosines and drift of the round cost on
top. The dense way computes Σ w BA as a [size, size] matrix, and its SVD for methods that split it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config.federation import AggregationConfig
from common.errors import RunError
from common.factors import A, B, R
from common.methods import METHODS
from common.tensors import Tensors, add
from server.aggregation.catalog import aggregator_of
from server.aggregation.products import measure
from simulations.benchmarks.memory import MIB, peak_bytes, resident_bytes

SPLITS = ("flexlora", "fedsvd")
"""Methods whose dense way needs the SVD of a dense matrix."""
DENSE = ("flora", "flexlora", "fedex_lora", "lora_fair", "fedsvd")
"""Methods that have a dense way that is not their own."""


def make_round(method: str, sites: int, rank: int, size: int, layers: int) -> tuple[Tensors, dict[str, Tensors]]:
    """Return a whole adapter and the updates of all sites, normal and seeded."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(size**-0.5)

    adapter: Tensors = {}
    for number in range(layers):
        adapter |= {f"layer.{number:03d}{A}": draw(rank, size), f"layer.{number:03d}{B}": draw(size, rank)}
        if METHODS[method].core:
            adapter[f"layer.{number:03d}{R}"] = draw(rank, rank)
    sent = [name for name in adapter if METHODS[method].sends(name, 1)]
    updates = {f"site {k:03d}": {name: draw(*adapter[name].shape) for name in sent} for k in range(sites)}
    return adapter, updates


def factored(method: str, adapter: Tensors, updates: dict[str, Tensors]) -> Tensors:
    """Aggregate as the coordinator does and return the next adapter."""
    aggregator = aggregator_of(AggregationConfig.model_validate({"method": method}))
    linear = METHODS[method].linear
    state = aggregator.init({name: adapter[name] for name in next(iter(updates.values()))})
    for site, update in updates.items():
        local = update if linear else {name: adapter[name] + value for name, value in update.items()}
        state = aggregator.update(state, site, local, 1.0)
    return aggregator.finish(state.mean() if linear else state, adapter)


def dense(method: str, adapter: Tensors, updates: dict[str, Tensors]) -> None:
    """Compute Σ w BA of every layer as a dense float32 matrix, and its SVD where the method splits it."""
    import torch

    for layer in {name.rpartition(".lora_")[0] for name in adapter}:
        total = torch.zeros(len(adapter[layer + B]), adapter[layer + A].shape[1])
        for update in updates.values():
            local = add({layer + A: adapter[layer + A], layer + B: adapter[layer + B]}, update)
            total += local[layer + B] @ local[layer + A] / len(updates)
        if method in SPLITS:
            torch.linalg.svd(total, full_matrices=False)


def measured(method: str, way: str, sites: int, rank: int, size: int, layers: int) -> dict[str, float]:
    """Aggregate one round in this process; seconds and growth in MiB.

    Args:
        method: by name.
        way: "factored", "dense", or "measure": a factored aggregation is made first and not counted.
        sites: K.
        rank: r.
        size: m and n.
        layers: number of layers.
    """
    import torch

    torch.set_num_threads(1)
    adapter, updates = make_round(method, sites, rank, size, layers)
    work: Callable[[], Any]
    if way == "measure":
        after = factored(method, adapter, updates)
        local = {site: add(adapter, update) for site, update in updates.items()}
        work = lambda: measure(adapter, after, local, dict.fromkeys(local, 1.0))  # noqa: E731
    else:
        work = lambda: {"factored": factored, "dense": dense}[way](method, adapter, updates)  # noqa: E731
    held, wall, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    work()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "growth_mib": max(0, peak_bytes() - held) / MIB,
        "updates_mib": sum(value.nbytes for update in updates.values() for value in update.values()) / MIB,
    }


def main(
    only: Annotated[list[str] | None, typer.Option("--method", help="Repeatable; all if not given.")] = None,
    sites: Annotated[int, typer.Option(min=1)] = 32,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    size: Annotated[int, typer.Option(min=1)] = 4096,
    layers: Annotated[int, typer.Option(min=1)] = 1,
    with_dense: Annotated[bool, typer.Option("--dense/--no-dense", help="The dense way too.")] = True,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table of seconds and memory, a line for each method and way."""
    if child is not None:
        print(json.dumps(measured((only or [""])[0], child, sites, rank, size, layers)))
        return
    table = Table(title=f"{sites} sites, rank {rank}, {layers} layers of {size} x {size}, one thread")
    for column in ("method", "way", "wall s", "CPU s", "grew MiB", "updates MiB"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for method in only or list(METHODS):
        ways = ("factored", *(("dense",) if with_dense and method in DENSE else ()), "measure")
        for way in ways if method != "fedsa_lora" else ("factored",):
            found = in_child(method, way, sites, rank, size, layers)
            numbers = (found[key] for key in ("wall_s", "cpu_s", "growth_mib", "updates_mib"))
            table.add_row(method, way, *(f"{number:.2f}" if number < 100 else f"{number:.0f}" for number in numbers))
    Console().print(table)


def in_child(method: str, way: str, *numbers: int) -> dict[str, float]:
    """Return what :func:`measured` gives in a fresh process.

    Args:
        method: by name.
        way: "factored", "dense" or "measure".
        numbers: sites, rank, size and layers.

    Raises:
        RunError: if that process fails.
    """
    names = ("--sites", "--rank", "--size", "--layers")
    options = [part for name, number in zip(names, numbers, strict=True) for part in (name, str(number))]
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "simulations.benchmarks.aggregation"]
    command += ["--method", method, "--child", way, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunError(f"an aggregation benchmark ended with status {done.returncode} ({last[:200]}); expected 0.")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
