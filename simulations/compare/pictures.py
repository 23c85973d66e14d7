"""The pictures of a comparison: how the variants came along, where they ended, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from simulations.compare.compare import Comparison
from simulations.study.curves import Point
from simulations.study.intervals import over_seeds
from simulations.study.shown import shown_metric
from simulations.study.style import GREY, INK, Picture, drawing, look

_SIDES: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
    ("by round", "rounds", lambda point: float(point.round)),
    ("by bytes", "MB up and down, all sites", lambda point: point.megabytes),
    ("by privacy spent", "ε spent, the most at any site", lambda point: point.epsilon),
    ("by simulated time", "simulated seconds", lambda point: point.simulated_s),
)


def comparison_pictures(comparison: Comparison) -> list[Picture]:
    """Draw a comparison."""
    return [_curves(comparison), _ends(comparison)]


def _curves(comparison: Comparison) -> Picture:
    label, factor = shown_metric(comparison.figures["headline"])
    sides = [side for side in _SIDES if any(_known(runs, side[2]) for runs in comparison.curves.values())]
    with drawing(columns=len(sides), width=4.1, height=3.7) as canvas:
        for panel, (title, unit, along) in zip(canvas.panels, sides, strict=True):
            for index, (name, runs) in enumerate(comparison.curves.items()):
                if _known(runs, along):
                    _line(panel, name, runs, along, factor, index)
            panel.set(title=title, xlabel=unit)
            if unit == "rounds":
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.panels[0].set_ylabel(label)
        for panel in canvas.panels[1:]:
            panel.sharey(canvas.panels[0])
        handles, names = canvas.panels[0].get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside lower left", ncols=min(3, len(names)))
        seeds = len(comparison.figures["seeds"])
        band = f"The band is the 95 % t-interval over {seeds} seeds." if seeds > 1 else "One seed, so no interval."
        return canvas.picture("curves", f"{label} on the test rows as the runs went on, mean over seeds. {band}")


def _line(
    panel: Axes, name: str, runs: Sequence[Sequence[Point]], along: Callable[[Point], float | None], factor: float,
    index: int,
) -> None:  # fmt: skip
    rounds = sorted(set.intersection(*({point.round for point in points} for points in runs)))
    at = [[next(point for point in points if point.round == number) for points in runs] for number in rounds]
    x = [float(np.mean([along(point) for point in points])) for points in at]
    estimates = [over_seeds([factor * point.headline for point in points]) for points in at]
    style = look(index)
    panel.plot(x, [estimate.value for estimate in estimates], label=name, **style)
    if all(estimate.low is not None for estimate in estimates):
        low, high = ([getattr(estimate, end) for estimate in estimates] for end in ("low", "high"))
        panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _known(runs: Sequence[Sequence[Point]], along: Callable[[Point], float | None]) -> bool:
    return all(along(point) is not None for points in runs for point in points)


def _ends(comparison: Comparison) -> Picture:
    figures = comparison.figures
    label, factor = shown_metric(figures["headline"])
    names, differences = list(figures["variants"]), figures["differences"]
    columns = 2 if differences else 1
    with drawing(columns=columns, width=5.4, height=1.3 + 0.42 * max(len(names), len(differences))) as canvas:
        panel = canvas.panels[0]
        for index, name in enumerate(names):
            values = [factor * value for value in figures["variants"][name]["per_seed"]["after"]]
            estimate, colour = over_seeds(values), look(index)["color"]
            panel.plot(values, [index] * len(values), "|", color=colour, markersize=11, alpha=0.7)
            _whisker(panel, estimate.value, estimate.low, estimate.high, index, colour)
        _rows(panel, names)
        panel.set(title="after the run", xlabel=label)
        if differences:
            panel = canvas.panels[1]
            panel.axvline(0, color=GREY, linewidth=1)
            for index, found in enumerate(differences):
                ends = [None if found[end] is None else factor * found[end] for end in ("low", "high")]
                _whisker(panel, factor * found["value"], ends[0], ends[1], index, INK)
            _rows(panel, [f"{found['second']}\nminus {found['first']}" for found in differences])
            unit = "points of accuracy" if factor > 1 else label
            panel.set(title="differences, paired by seed", xlabel=unit)
        caption = (
            "Left, the metric after the run: strokes are seeds, dots their mean. Right, differences of two variants."
        )
        return canvas.picture("after", f"{caption} Bars are 95 % t-intervals over seeds, where there are several.")


def _whisker(panel: Axes, value: float, low: float | None, high: float | None, row: int, colour: str) -> None:
    if low is not None and high is not None:
        panel.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    panel.plot([value], [row], "o", color=colour, markersize=6)


def _rows(panel: Axes, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(visible=False, axis="y")
