"""Writes the tables of ``docs/results.md`` from runs, with seeds and intervals; run it with ``make results``.

Each line of a table, and each cell of a grid, is a config with overrides, run once a seed into ``runs/results/``. Runs
that are complete are not repeated, so the script can be stopped and started again, and several may work side by side
on different lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console

from common.config.load import load_run_config
from common.config.run import RunConfig
from simulations.commands.options import set_up
from simulations.commands.progress import RunLines
from simulations.results.lines import GRIDS, TABLES, Grid, Line
from simulations.results.page import markdown, write_tables
from simulations.study.intervals import over_seeds
from simulations.study.runs import PlannedRun, run_missing
from simulations.study.shown import mean_and_half
from simulations.study.variants import slug

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "results"
PAGE = ROOT / "docs" / "results.md"


def folder_of(line: Line, seed: int) -> Path:
    """Return the run folder of a line and seed."""
    return RUNS / f"{line.config}--{slug(line.label)}--{seed}"


def missing_runs(lines: Sequence[Line], seeds: Iterable[int]) -> list[PlannedRun]:
    """Return the runs of the lines that have no summary yet, all of one seed before the next."""
    return [
        PlannedRun(line.label, _config(line, seed), folder_of(line, seed))
        for seed in seeds
        for line in lines
        if not (folder_of(line, seed) / "summary.json").exists()
    ]


def _config(line: Line, seed: int) -> RunConfig:
    overrides = [f"seed={seed}", "evaluation.every=0", *line.overrides]
    return load_run_config(ROOT / "configs" / f"{line.config}.yaml", overrides)


def interval(values: list[float], digits: int = 1) -> str:
    """Return mean ± half-width of the 95 % t-interval; the mean alone for one run."""
    return mean_and_half(over_seeds(values), digits)


def table(lines: tuple[Line, ...]) -> str:
    """Return the Markdown table of the lines whose runs are there."""
    rows = [_row(line, found) for line in lines if (found := summaries(line))]
    metric = rows[0]["metric"] if rows else "metric"
    head = ["", f"{metric} before", f"{metric} after", "worst site", "ε spent", "kB up a round", "seeds"]
    body = [[r["label"], r["before"], r["after"], r["worst"], r["epsilon"], r["bytes"], r["seeds"]] for r in rows]
    return markdown([head, *body])


def grid(cells: Grid) -> str:
    """Return the Markdown table of a grid: the headline metric after the run, mean ± interval (number of seeds)."""
    head = ["accuracy (%)", *("no DP" if e is None else f"ε = {e:g}" for e in cells.epsilons)]
    body = [
        [method, *(_cell(summaries(cells.cell(method, epsilon))) for epsilon in cells.epsilons)]
        for method in cells.methods
    ]
    return markdown([head, *body])


def summaries(line: Line) -> list[dict[str, Any]]:
    """Return the summaries of the runs of a line that are complete, by seed."""
    found = (folder_of(line, seed) / "summary.json" for seed in range(6))
    return [json.loads(path.read_text()) for path in found if path.exists()]


def _cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return "-"
    values = [100.0 * summary["metrics_after"]["test"]["overall"]["accuracy"] for summary in found]
    return f"{interval(values)} ({len(values)})"


def _row(line: Line, found: list[dict[str, Any]]) -> dict[str, str]:
    name = found[0]["headline"]
    factor = 100.0 if name == "accuracy" else 1.0

    def values(part: str, of_worst: bool = False) -> list[float]:
        metrics = [summary[part]["test"] for summary in found]
        chosen = [m["by_site"][m["worst_site"]] if of_worst else m["overall"] for m in metrics]
        return [factor * metric[name] for metric in chosen]

    spent = [max(summary["epsilon"].values(), default=math.inf) for summary in found]
    sent = [mean(n for counts in summary["bytes_up"].values() for n in counts if n) / 1000 for summary in found]
    return {
        "label": line.label,
        "metric": f"{name} (%)" if factor > 1 else name,
        "before": interval(values("metrics_before")),
        "after": interval(values("metrics_after")),
        "worst": interval(values("metrics_after", of_worst=True)),
        "epsilon": "∞" if math.isinf(max(spent)) else f"{max(spent):.2f}",
        "bytes": f"{mean(sent):.1f}",
        "seeds": str(len(found)),
    }


def write_page() -> None:
    """Replace what stands between the markers of each table in ``docs/results.md``."""
    written = {name: table(lines) for name, lines in TABLES.items()} | {n: grid(g) for n, g in GRIDS.items()}
    write_tables(PAGE, written, "make results")


def every_line() -> list[Line]:
    """Return the lines of all tables and the cells of all grids."""
    return [
        *(line for lines in TABLES.values() for line in lines),
        *(cell for cells in GRIDS.values() for cell in cells.cells()),
    ]


def main(
    seeds: Annotated[int, typer.Option(min=1, max=5, help="Seeds a line, from 0.")] = 3,
    only: Annotated[str, typer.Option(help="Run only lines whose label or config contains this.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    run: Annotated[bool, typer.Option(help="Run what is missing before writing the tables.")] = True,
) -> None:
    """Run what is missing and write the tables."""
    set_up(debug=False, threads=threads)
    chosen = [line for line in every_line() if only in f"{line.config} {line.label}"]
    run_missing(missing_runs(chosen, range(seeds if run else 0)), watching=RunLines(Console()))
    write_page()


if __name__ == "__main__":
    typer.run(main)
