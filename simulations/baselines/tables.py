"""The table of the baselines, for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from simulations.study.shown import NOTHING, estimate_of, metric, signed_interval

SHORT = {"base": "base", "alone": "alone", "head_only": "head only", "joined": "joined", "pooled": "pooled"}


def level_head(figures: Mapping[str, Any]) -> list[str]:
    """Return the columns of :func:`level_rows`."""
    return ["site", "test rows", *(SHORT[name] for name in figures["titles"])]


def level_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return how well every baseline does on each site's test rows, and over all rows last."""
    names, headline = list(figures["titles"]), figures["headline"]
    rows = [
        [site, str(found["test_rows"]), *(metric(headline, found["metrics"].get(name)) for name in names)]
        for site, found in figures["sites"].items()
    ]
    total = sum(found["test_rows"] for found in figures["sites"].values())
    return [*rows, ["all rows", str(total), *(metric(headline, figures["overall"][name]["value"]) for name in names)]]


def gain_head(figures: Mapping[str, Any], of: str) -> list[str]:
    """Return the columns of gains, the first being ``of``."""
    return [of, f"gain, {figures['unit']}", *(["p"] if figures["headline"] == "accuracy" else []), "better"]


def gain_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return what each site gains by joining over training alone, and all sites last."""
    rows = [[site, *_gain(found["gain"], figures)] for site, found in figures["sites"].items()]
    return [*rows, ["all sites", *_gain(figures["gain_overall"]["alone"], figures)]]


def overall_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return what joining gains over each baseline, over all test rows."""
    return [
        [figures["titles"][name], *_gain(gain, figures)[:-1], gain["verdict"].replace("alone", "the baseline")]
        for name, gain in figures["gain_overall"].items()
    ]


def baseline_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the tables: levels by site, gains by site, gains over all rows."""
    seeds = len(figures["seeds"])
    counted = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    title = f"{figures['name']}: {figures['headline']} on each site's test rows, {counted}"
    return [
        _table(title, level_head(figures), level_rows(figures), total=True),
        _table(
            "Does joining beat training alone? Gain [95 %]", gain_head(figures, "site"), gain_rows(figures), total=True
        ),
        _table("Gain by joining over all test rows [95 %]", gain_head(figures, "over"), overall_rows(figures)),
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for number, cells in enumerate(rows, start=1):
        last = total and number == len(rows)
        table.add_row(
            *map(escape, cells), style="bold" if last else None, end_section=total and number == len(rows) - 1
        )
    return table


def _gain(gain: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> list[str]:
    with_p = figures["headline"] == "accuracy"
    if gain is None:
        return [NOTHING] * (3 if with_p else 2)
    digits = 1 if with_p else 3
    p = gain["p"]
    shown_p = [] if not with_p else [NOTHING if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"]
    return [signed_interval(estimate_of(gain), digits), *shown_p, gain["verdict"]]
