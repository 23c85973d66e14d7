"""Entry point of ``make bench``: prints a table of ratios and writes ``bench.json``, one record a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.quiet import quiet_dependencies

quiet_dependencies()

from common.config.load import load_run_config  # noqa: E402
from simulations.benchmarks.dp import CASES, dp_figures  # noqa: E402
from simulations.benchmarks.harness import benchmark_config, harness_figures  # noqa: E402
from simulations.benchmarks.measure import Measurement  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("harness", "dp")


def main(
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(PARTS)}; both if not given.")] = None,
    rows: Annotated[int, typer.Option(min=8, help="Harness: most rows of a site.")] = 100000,
    rounds: Annotated[int, typer.Option(min=1, help="Harness: rounds.")] = 1,
    pairs: Annotated[int | None, typer.Option(min=1, help="Timed pairs; 3 of the harness, 7 of a step.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("bench.json"),
) -> None:
    """Time the harness against a plain loop, and the DP step against the plain step."""
    import torch

    if only is not None and only not in PARTS:
        raise typer.BadParameter(f"{only!r}; expected one of {', '.join(PARTS)}.", param_hint="--only")
    torch.set_num_threads(threads)
    console = Console()
    figures: list[Measurement] = []
    if only in (None, "harness"):
        name, config = benchmark_config(ROOT, rows, rounds)
        console.print(f"{name}: {rounds} rounds, at most {rows} rows a site, {threads} threads")
        measured, distance = harness_figures(name, config, pairs or 3)
        figures += measured
        console.print(f"adapters of harness and plain loop differ by {distance:.1e} of their norm")
    if only in (None, "dp"):
        base = load_run_config(ROOT / "configs" / "quickstart.yaml", [])
        figures += _shown(console, dp_figures(base, CASES, pairs or 7))
    _print(console, figures)
    records = ",\n".join(json.dumps(figure.as_dict()) for figure in figures)
    out.write_text(f"[\n{records}\n]\n", encoding="utf-8")
    console.print(f"written to {out}", highlight=False)


def _shown(console: Console, figures: Iterable[Measurement]) -> Iterable[Measurement]:
    for figure in figures:
        console.print(f"{figure.name}: {figure.ratio:.3f}", highlight=False)
        yield figure


def _print(console: Console, figures: list[Measurement]) -> None:
    table = Table()
    for column in ("name", "ratio", "ours", "baseline", "unit", "pairs"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for figure in figures:
        numbers = (f"{figure.ratio:.3f}", f"{figure.ours:.3f}", f"{figure.baseline:.3f}")
        table.add_row(figure.name, *numbers, figure.unit, str(figure.runs))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
