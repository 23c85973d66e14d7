"""The tables that ``fedtune-client`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

_SHORT = 12
"""Hexadecimal digits of a fingerprint or run that are shown; --json has them all."""


def plan_tables(plan: dict[str, Any]) -> Iterator[Table | str]:
    """Yield what is shown of a plan: a line of what is planned, ε by rounds, noise by ε, the budget, advice."""
    what = "persons" if plan["unit"] == "user" else "records"
    yield (
        f"{plan['name']}: {plan['units_at_site']} {what}, {plan['steps_per_round']} steps a round, "
        f"sample rate {plan['sample_rate']:.4g}, noise multiplier {plan['noise_multiplier']:.4g}, "
        f"δ={plan['delta']:g}, {plan['accountant'].upper()}"
    )
    budget = plan["budget"]
    columns = ["rounds", "steps", "ε of this run"] + ([f"ε with the ledger, δ={budget['delta']:g}"] if budget else [])
    rows = [
        [str(row["rounds"]), str(row["steps"]), _number(row["epsilon"])]
        + ([_number(row["epsilon_with_ledger"])] if budget else [])
        for row in plan["epsilon_after"]
    ]
    yield _table("spent after", columns, rows)
    noise = [[_number(row["epsilon"]), _noise(row["noise_multiplier"])] for row in plan["noise_for"]]
    yield _table(f"noise for all {plan['rounds']} rounds", ["ε", "noise multiplier"], noise)
    if budget:
        yield (
            f"Budget ε {budget['epsilon']:g} for one {'person' if budget['unit'] == 'user' else 'record'}: "
            f"{budget['epsilon_spent']:.2f} spent; {budget['steps_left']} steps left with this noise, "
            f"{budget['rounds_left']} whole rounds."
        )
    for sentence in plan["advice"]:
        yield f"Advice: {sentence}"


def ledger_tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """Yield what is shown of a ledger: what was spent by dataset, by run, and the verified head of the chain."""
    budget = report["budget"]
    capped = budget["epsilon"] is not None
    title = f"spent of one {'person' if budget['unit'] == 'user' else 'record'}, δ={budget['delta']:g}"
    if capped:
        title += f", budget ε {budget['epsilon']:g}"
    columns = ["dataset", "rows", "first seen", "rounds", "ε spent"] + (["ε left", "rounds left*"] if capped else [])
    datasets = [
        [row["dataset"][:_SHORT], str(row["rows"]), row["first_seen"], str(row["rounds_charged"]),
         _number(row["epsilon_spent"])]
        + ([_number(row["epsilon_left"]), _number(row["rounds_left_like_the_last"])] if capped else [])
        for row in report["datasets"]
    ]  # fmt: skip
    if not datasets:
        yield f"{title}: nothing was charged yet."
        yield f"{report['events']} events, chain unbroken, head {report['head']}"
        return
    yield _table(title, columns, datasets)
    if capped:
        yield "* whole rounds like the last one. Datasets that share a record or person share what was spent."
    runs = [
        [row["run"][:_SHORT], row["dataset"][:_SHORT], _span(row["rounds"]), str(len(row["without_release"])),
         ", ".join(row["unit"]), str(row["steps"]), _several(row["noise_multiplier"]), _several(row["sample_rate"]),
         _number(row["epsilon_alone"]), row["last"]]
        for row in report["runs"]
    ]  # fmt: skip
    yield _table("runs", ["run", "data", "rounds", "open", "unit", "steps", "σ", "q", "ε alone", "last"], runs)
    yield "open: rounds charged without a release. σ: noise multiplier. q: sample rate."
    yield f"{report['events']} events, chain unbroken, head {report['head']}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _noise(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _several(values: Sequence[float]) -> str:
    return ", ".join(_noise(value) for value in values[:2]) + (", ..." if len(values) > 2 else "")


def _span(rounds: Sequence[int]) -> str:
    whole = list(rounds) == list(range(rounds[0], rounds[-1] + 1)) and len(rounds) > 1
    return f"{rounds[0]}-{rounds[-1]}" if whole else ", ".join(map(str, rounds))
