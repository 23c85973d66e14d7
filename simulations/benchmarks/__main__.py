"""Entry point of ``make bench``: prints a table of ratios and writes ``bench.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.quiet import quiet_dependencies

quiet_dependencies()

from common.config.load import load_run_config  # noqa: E402
from common.config.run import RunConfig  # noqa: E402
from common.tensors import Tensors, l2_norm, subtract  # noqa: E402
from simulations.benchmarks.harness import run_fedtune, run_plain_loop  # noqa: E402
from simulations.benchmarks.measure import Measurement, in_pairs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def benchmark_config(rows: int, rounds: int) -> tuple[str, RunConfig]:
    """Return the work: product reviews by product where the data is there, else the embedded clinic messages."""
    reviews = ROOT.parent / "shared" / "data" / "product_reviews"
    name = "product-reviews" if reviews.is_dir() else "quickstart"
    overrides = [
        "privacy={unit: none}", "evaluation.enabled=false", "data.test=null", f"federation.rounds={rounds}",
        f"data.max_rows_per_site={rows}", "aggregation={method: fedit, weights: examples}",
        "training={lr: 2.0e-3, batch_size: 16, local_epochs: 1}",
    ]  # fmt: skip
    return name, load_run_config(ROOT / "configs" / f"{name}.yaml", overrides)


def main(
    rows: Annotated[int, typer.Option(min=8, help="Most rows of a site.")] = 100000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Pairs of timed runs.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("bench.json"),
) -> None:
    """Time the harness against a plain loop, and check that both end on the same adapter."""
    import torch

    torch.set_num_threads(threads)
    console = Console()
    name, config = benchmark_config(rows, rounds)
    console.print(f"{name}: {rounds} rounds, at most {rows} rows a site, {threads} threads, {runs} pairs")
    ours, plain = Side(run_fedtune, config), Side(run_plain_loop, config)
    figures = in_pairs(f"{name}, fedtune-sim against a plain loop", ours, plain, runs)
    distance = l2_norm(subtract(ours.adapter, plain.adapter)) / l2_norm(plain.adapter)
    _print(console, figures)
    out.write_text(json.dumps([figure.as_dict() for figure in figures], indent=2) + "\n", encoding="utf-8")
    console.print(f"adapters of the two differ by {distance:.1e} of their norm; written to {out}", highlight=False)


class Side:
    """One side of the comparison; keeps the adapter of its last run.

    Args:
        work: what is timed.
        config: the run config.
    """

    def __init__(self, work: Callable[[RunConfig], Tensors], config: RunConfig) -> None:
        self._work, self._config = work, config
        self.adapter: Tensors = {}

    def __call__(self) -> None:
        """Do the work once."""
        self.adapter = self._work(self._config)


def _print(console: Console, figures: list[Measurement]) -> None:
    table = Table()
    for column in ("name", "ratio", "ours", "baseline", "unit", "runs"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for figure in figures:
        numbers = (f"{figure.ratio:.3f}", f"{figure.ours:.2f}", f"{figure.baseline:.2f}")
        table.add_row(figure.name, *numbers, figure.unit, str(figure.runs))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
