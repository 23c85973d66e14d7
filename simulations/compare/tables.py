"""The tables of a comparison, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from simulations.study.intervals import Estimate
from simulations.study.shown import estimate_of, mean_and_half, shown_metric, signed_interval

COLUMNS = ("before", "after", "worst site", "ε", "MB", "seconds")
"""Of :func:`variant_rows`; a terminal gets those in the middle."""


def comparison_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the table of the variants and, for several, that of their differences."""
    label, factor = shown_metric(figures["headline"])
    seeds = len(figures["seeds"])
    after = Table(
        title=f"{label} after the run, {seeds} {'seed' if seeds == 1 else 'seeds'} (± half of the 95 % t-interval)",
        title_justify="left",
    )
    after.add_column("variant", overflow="fold")
    for column in COLUMNS[1:-1]:
        after.add_column(column, justify="right", no_wrap=True)
    for name, cells in variant_rows(figures):
        after.add_row(escape(name), *cells[1:-1])
    tables = [after]
    if figures["differences"]:
        table = Table(title="differences, paired by seed [95 % t-interval]", title_justify="left")
        table.add_column("variant", overflow="fold")
        table.add_column("minus", overflow="fold")
        for column in ("difference", "decided"):
            table.add_column(column, justify="right")
        for first, second, shown, decided in difference_rows(figures, factor):
            table.add_row(escape(second), escape(first), shown, escape(decided))
        tables.append(table)
    return tables


def variant_rows(figures: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the label of each variant and its cells, see :data:`COLUMNS`."""
    _, factor = shown_metric(figures["headline"])
    rows = []
    for name, found in figures["variants"].items():
        known = {key: None if value is None else estimate_of(value) for key, value in found["estimates"].items()}

        def scaled(key: str, known: Mapping[str, Estimate | None] = known) -> str:
            estimate = known[key]
            return mean_and_half(None if estimate is None else estimate.scaled(factor))

        spent = [value for value in found["per_seed"]["epsilon"] if value is not None]
        rows.append(
            (
                name,
                [
                    scaled("before"), scaled("after"), scaled("worst_site"),
                    f"{max(spent):.2f}" if spent else "∞", mean_only(known["megabytes"]), mean_only(known["seconds"]),
                ],
            )
        )  # fmt: skip
    return rows


def difference_rows(figures: Mapping[str, Any], factor: float) -> list[tuple[str, str, str, str]]:
    """Return first, second, the difference with its interval, and which is better where that is decided."""
    rows = []
    for found in figures["differences"]:
        estimate = estimate_of(found).scaled(factor)
        sign = estimate.verdict * (1 if figures["higher_is_better"] else -1)
        decided = {1: f"{found['second']} is better", -1: f"{found['first']} is better", 0: "no"}[sign]
        rows.append((found["first"], found["second"], signed_interval(estimate), decided))
    return rows


def mean_only(estimate: Estimate | None) -> str:
    """Return the mean, with two digits below ten."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.{2 if abs(estimate.value) < 10 else 1}f}"
