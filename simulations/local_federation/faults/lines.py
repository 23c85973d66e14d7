"""Faults as lines of JSON, and the table that is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from simulations.local_federation.faults.kinds import FAULTS
from simulations.results.page import markdown

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Return the faults in a file, none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def append_line(path: Path, line: Line) -> None:
    """Add a fault to a file; two scripts may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def table(lines: Sequence[Line]) -> str:
    """Return the Markdown table of faults, a row for each kind and one for all."""
    head = [
        "killed", "faults", "run complete", "rounds repeated: none, one, more", "same bits", "budgets right",
        "closed by the deadline", "sites came back", "median s until whole again",
    ]  # fmt: skip
    rows = [_row(fault.what, found) for kind, fault in FAULTS.items() if (found := _of(lines, kind))]
    return markdown([head, *rows, _row("**all**", lines)])


def _of(lines: Iterable[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _row(name: str, lines: Sequence[Line]) -> list[str]:
    repeated = [line["rounds_repeated"] for line in lines]
    counts = [repeated.count(0), repeated.count(1), sum(number > 1 for number in repeated)]
    return [
        name,
        str(len(lines)),
        _share([line["ended"] == "completed" for line in lines]),
        ", ".join(map(str, counts)),
        _share([line["same_bits"] for line in lines]),
        _share([None if line["budgets"] is None else not line["budgets"] for line in lines]),
        _share([line["in_time"] for line in lines]),
        _share([line["rejoined"] for line in lines]),
        f"{median(line['seconds'] for line in lines):.0f}",
    ]


def _share(held: Iterable[bool | None]) -> str:
    """Return how often something held of how often it was asked; a dash where it never was."""
    asked = [one for one in held if one is not None]
    return f"{sum(asked)} of {len(asked)}" if asked else "-"
