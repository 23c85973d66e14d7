"""One look for all pictures: colours that colour-blind people tell apart, markers beside them, units on every axis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.atomic import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a8a8a")
"""Okabe and Ito's palette (2008), those first that contrast most on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GREY, FAINT = "#1f2937", "#6b7280", "#e5e7eb"

_STYLE: dict[str, Any] = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    # A site's name is text, whatever dollars are in it.
    "text.parse_math": False,
    "svg.hashsalt": "fedtune",
}


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        name: of its files, without ending.
        caption: a sentence that says what is seen.
        svg: for pages.
        png: for everything else.
    """

    name: str
    caption: str
    svg: bytes
    png: bytes

    def save(self, folder: Path) -> None:
        """Write ``<name>.svg`` and ``<name>.png``."""
        write_atomic(folder / f"{self.name}.svg", self.svg)
        write_atomic(folder / f"{self.name}.png", self.png)


@contextmanager
def drawing(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.4) -> Iterator[Canvas]:
    """Give a figure in the common style; draw within the block.

    Args:
        columns: panels beside each other.
        rows: panels below each other.
        width: of a panel, inches.
        height: of a panel, inches.
    """
    with matplotlib.rc_context(cast(Any, _STYLE)):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        yield Canvas(figure, [axes for row in panels for axes in row])


@dataclass(frozen=True)
class Canvas:
    """A figure and its panels, row by row."""

    figure: Figure
    panels: list[Axes]

    def picture(self, name: str, caption: str) -> Picture:
        """Return what was drawn; call it within the block of :func:`drawing`."""
        drawn = {}
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            content = BytesIO()
            self.figure.savefig(content, format=kind, metadata=metadata)
            drawn[kind] = content.getvalue()
        return Picture(name, caption, drawn["svg"], drawn["png"])


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of the n-th series; after eight, markers go on changing against the colours."""
    turn = index // len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + turn) % len(MARKERS)]}
