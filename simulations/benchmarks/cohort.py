"""What training sites in one pass saves: many small virtual sites, against a plain loop and one by one.

::

    python -m simulations.benchmarks.cohort [--sites 200] [--rows 8] [--rounds 3] [--pairs 3] [--private]

The work is one step on each site's rows, all of them, in every round: product reviews dealt to the sites, or the
embedded clinic messages where those are not at hand. The plain loop is
:func:`simulations.benchmarks.harness.run_plain_loop`, each batch padded to its longest row. One thread; CPU seconds of
this process, with model loading and tokenising, which both sides do. Sides are timed in turn, and ratios are medians
over the turns, so that another load on the machine tells less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from common.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402

from common.config.load import load_run_config  # noqa: E402
from common.config.run import RunConfig  # noqa: E402
from simulations.benchmarks.harness import run_fedtune, run_plain_loop  # noqa: E402
from simulations.engines.settings import EngineSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COHORTS = (1, 4, 8, 16, 32)
BARE = "plain loop"


def small_sites(root: Path, sites: int, rows: int, rounds: int, *, private: bool) -> RunConfig:
    """Return the run config of the benchmark."""
    reviews = root.parent / "shared" / "data" / "product_reviews"
    name = "product-reviews" if reviews.is_dir() else "quickstart"
    privacy = (
        "privacy={unit: example, noise_multiplier: 1.0, delta: 1.0e-3, sample_rate: 1.0, clip_norm: 0.1}"
        if private
        else "privacy={unit: none}"
    )
    overrides = [
        privacy, "evaluation.enabled=false", "data.test=null", f"federation.rounds={rounds}",
        f"data.max_rows_per_site={rows}", f"data.partition={{kind: iid, sites: {sites}}}",
        f"aggregation={{method: fedit, weights: {'uniform' if private else 'examples'}}}",
        f"training={{optimizer: adamw, lr: 2.0e-3, batch_size: {rows}, local_steps: 1}}",
    ]  # fmt: skip
    return load_run_config(root / "configs" / f"{name}.yaml", overrides)


def in_turn(work: dict[str, Callable[[], None]], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Do each of ``work`` once untimed, then ``turns`` times in turn; return wall and CPU seconds of each time."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, one in work.items():
            wall, cpu = time.perf_counter(), time.process_time()
            one()
            if turn:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def main(
    sites: Annotated[int, typer.Option(min=2)] = 200,
    rows: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    pairs: Annotated[int, typer.Option(min=1)] = 3,
    private: Annotated[bool, typer.Option("--private", help="Ours with example-level DP.")] = False,
) -> None:
    """Print seconds and ratios to the plain loop, by size of the cohort."""
    torch.set_num_threads(1)
    config = small_sites(ROOT, sites, rows, rounds, private=private)

    def ours(size: int) -> Callable[[], None]:
        return lambda: void(run_fedtune(config, EngineSettings(cohort=size)))

    work = {BARE: lambda: void(run_plain_loop(config))} | {f"cohorts of {size}": ours(size) for size in COHORTS}
    seconds = in_turn(work, pairs)
    print(f"{config.name}: {sites} sites x {rows} rows x 1 step, {rounds} rounds{', DP' if private else ''}, 1 thread")
    for name, times in seconds.items():
        walls, cpus = zip(*times, strict=True)
        ratio = median(own / bare for own, (_, bare) in zip(cpus, seconds[BARE], strict=True))
        print(f"{name:16} {median(walls):8.2f} s wall {median(cpus):8.2f} s CPU  {ratio:6.3f} of the {BARE}")


def void(result: object) -> None:
    """Forget a result."""


if __name__ == "__main__":
    typer.run(main)
