"""A line of the benchmark table, and the table for a terminal, for Markdown and for JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from common.errors import RunError
from simulations.benchmarks.measure import Measurement, Seconds

HEAD = ("", "ours", "baseline", "unit", "ratio", "CPU ratio", "target", "limit / baseline", "ours / limit", "pairs")


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        part: a key of ``simulations.benchmarks.parts.PARTS``.
        name: what is compared.
        ours: median of ours, in ``unit``.
        baseline: median of the baseline; None where there is none.
        ratio: median over the pairs of ours / baseline (for Flower: of Flower / ours).
        cpu_ratio: the same of CPU seconds.
        unit: unit of ours and baseline.
        target: what it is to be, as text; empty if it is only reported.
        limit_over_baseline: arithmetic limit / baseline, CPU seconds.
        ours_over_limit: ours / arithmetic limit, CPU seconds.
        pairs: number of pairs.
    """

    part: str
    name: str
    ours: float
    baseline: float | None = None
    ratio: float | None = None
    cpu_ratio: float | None = None
    unit: str = "s"
    target: str = ""
    limit_over_baseline: float | None = None
    ours_over_limit: float | None = None
    pairs: int = 1

    def against_limit(self, ours: Sequence[Seconds], baseline: Sequence[Seconds], limits: Sequence[float]) -> Line:
        """Return it with its distance from the limit.

        Args:
            ours: what ours took, by turn.
            baseline: what the baseline took.
            limits: CPU seconds of the arithmetic limit, by turn.
        """
        return replace(
            self,
            limit_over_baseline=median(limit / one.cpu for limit, one in zip(limits, baseline, strict=True)),
            ours_over_limit=median(one.cpu / limit for limit, one in zip(limits, ours, strict=True)),
        )

    def cells(self) -> list[str]:
        """Return the cells below :data:`HEAD`."""
        return [
            self.name, _number(self.ours), _number(self.baseline), self.unit, _number(self.ratio),
            _number(self.cpu_ratio), self.target, _number(self.limit_over_baseline), _number(self.ours_over_limit),
            str(self.pairs),
        ]  # fmt: skip


def compared(part: str, name: str, ours: Sequence[Seconds], baseline: Sequence[Seconds], target: str = "") -> Line:
    """Return the line of ours / baseline: medians of wall seconds and of the ratios of the pairs."""
    pairs = list(zip(ours, baseline, strict=True))
    return Line(
        part, name, median(one.wall for one in ours), median(one.wall for one in baseline),
        median(a.wall / b.wall for a, b in pairs), median(a.cpu / b.cpu for a, b in pairs),
        target=target, pairs=len(pairs),
    )  # fmt: skip


def slower(part: str, name: str, ours: Sequence[Seconds], other: Sequence[Seconds], target: str = "") -> Line:
    """As :func:`compared`, with the ratios of other / ours."""
    pairs = list(zip(ours, other, strict=True))
    return replace(
        compared(part, name, ours, other, target),
        ratio=median(b.wall / a.wall for a, b in pairs),
        cpu_ratio=median(b.cpu / a.cpu for a, b in pairs),
    )


def of_measurements(part: str, wall: Measurement, cpu: Measurement, target: str = "") -> Line:
    """Return the line of the two measurements that :func:`simulations.benchmarks.measure.in_pairs` gives."""
    name = wall.name.removesuffix(", wall")
    return Line(part, name, wall.ours, wall.baseline, wall.ratio, cpu.ratio, wall.unit, target, pairs=wall.runs)


def wide_console() -> Console:
    """Return a console on which the table's cells are not broken, however narrow the terminal."""
    return Console(width=max(Console().width, 160))


def terminal_table(lines: Sequence[Line], title: str) -> Table:
    """Return the table for a terminal."""
    table = Table(title=title, title_justify="left")
    for column in HEAD:
        table.add_column(column, justify="left" if column in ("", "unit", "target") else "right")
    for line in lines:
        table.add_row(*line.cells())
    return table


def markdown_table(lines: Sequence[Line]) -> str:
    """Return the table as Markdown."""
    rows = [list(HEAD), ["---"] * len(HEAD), *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def as_json(lines: Sequence[Line], title: str = "") -> str:
    """Return the lines as JSON, one record a line; each says what was measured, by the table's title."""
    return "[\n" + ",\n".join(json.dumps({**asdict(line), "title": title}) for line in lines) + "\n]\n"


def lines_of_before(path: Path, title: str) -> list[Line]:
    """Return the lines of a file of :func:`as_json` that were measured under the same title; none without the file.

    Raises:
        RunError: for a file that is none.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        same = [record for record in records if record.pop("title") == title]
        return [Line(**record) for record in same]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} holds no figures of this benchmark; expected them or no file. Remove it.") from None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
