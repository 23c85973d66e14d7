"""The table of a sweep, for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from simulations.study.shown import NOTHING, metric

TOP = 10
"""Trials shown in a terminal."""


def trial_head(result: Mapping[str, Any]) -> list[str]:
    """Return the columns."""
    return [
        "trial",
        *(key for key in result["plan"]["search"]),
        "worth",
        result["headline"],
        "worst site",
        "ε",
        "rounds",
    ]


def trial_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells a trial, complete ones first, the best on top."""
    order = sorted(
        result["trials"], key=lambda trial: (trial["value"] is None, -(trial["value"] or 0), trial["number"])
    )
    rows = []
    for trial in order:
        values = [_shown(trial["params"].get(key)) for key in result["plan"]["search"]]
        worth = f"{trial['value']:.4f}" if trial["value"] is not None else trial["state"]
        spent = [epsilon for epsilon in trial["epsilon"] if epsilon is not None]
        rows.append(
            [
                str(trial["number"] + 1), *values, worth, metric(result["headline"], _mean(trial["headline"])),
                metric(result["headline"], _mean([w for w in trial["worst_site"] if w is not None])),
                f"{max(spent):.2f}" if spent else NOTHING, "/".join(map(str, trial["rounds"])),
            ]
        )  # fmt: skip
    return rows


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Return the best trials."""
    rows = trial_rows(result)
    shown = f"{len(rows)} trials" if len(rows) <= TOP else f"the best {TOP} of {len(rows)} trials"
    table = Table(title=f"{result['name']}: {shown}, judged on {result['judged_on']}", title_justify="left")
    for number, column in enumerate(trial_head(result)):
        # A dotted key may break at its dots.
        table.add_column(column.replace(".", ".\n"), justify="right" if number else "left", overflow="fold")
    for cells in rows[:TOP]:
        table.add_row(*map(escape, cells))
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else NOTHING if value is None else str(value)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
