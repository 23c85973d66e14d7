"""The table of the baselines, for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from simulations.study.shown import NOTHING, estimate_of, metric, signed_interval

SHORT = {"base": "base", "alone": "alone", "head_only": "head only", "joined": "joined", "pooled": "pooled"}


def baseline_head(figures: Mapping[str, Any]) -> list[str]:
    """Return the columns."""
    p = ["p"] if figures["headline"] == "accuracy" else []
    return ["site", "rows", *(SHORT[name] for name in figures["titles"]), "gain [95 %]", *p, "better"]


def baseline_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells a site, and that of all sites last."""
    names = list(figures["titles"])
    rows = []
    for site, found in figures["sites"].items():
        levels = [metric(figures["headline"], found["metrics"].get(name)) for name in names]
        rows.append([site, str(found["test_rows"]), *levels, *_gain(found["gain"], figures)])
    total = sum(found["test_rows"] for found in figures["sites"].values())
    levels = [metric(figures["headline"], figures["overall"][name]["value"]) for name in names]
    rows.append(["all rows", str(total), *levels, *_gain(figures["gain_overall"]["alone"], figures)])
    return rows


def overall_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return what joining gains over each baseline, over all test rows."""
    return [
        [figures["titles"][name], *_gain(gain, figures)[:-1], gain["verdict"].replace("alone", "the baseline")]
        for name, gain in figures["gain_overall"].items()
    ]


def baseline_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the tables by site and over all rows."""
    seeds = len(figures["seeds"])
    table = Table(
        title=f"{figures['name']}: does joining beat training alone? {figures['headline']} on each site's test rows, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}",
        title_justify="left",
    )
    rows = baseline_rows(figures)
    for number, column in enumerate(baseline_head(figures)):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number > 0)
    for cells in rows[:-1]:
        table.add_row(*map(escape, cells))
    table.add_section()
    table.add_row(*map(escape, rows[-1]), style="bold")
    overall = Table(title=f"gain by joining over all test rows, {figures['unit']}", title_justify="left")
    for number, column in enumerate(["over", *baseline_head(figures)[2 + len(figures["titles"]) :]]):
        overall.add_column(column, justify="left" if number == 0 else "right")
    for cells in overall_rows(figures):
        overall.add_row(*map(escape, cells))
    return [table, overall]


def _gain(gain: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> list[str]:
    with_p = figures["headline"] == "accuracy"
    if gain is None:
        return [NOTHING] * (3 if with_p else 2)
    digits = 1 if with_p else 3
    p = gain["p"]
    shown_p = [] if not with_p else [NOTHING if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"]
    return [signed_interval(estimate_of(gain), digits), *shown_p, gain["verdict"]]
