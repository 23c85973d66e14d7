"""The pictures of a sweep: how it went on, and what each setting was worth."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simulations.study.style import COLOURS, GREY, Picture, drawing

_PER_ROW = 3


def sweep_pictures(result: Mapping[str, Any]) -> list[Picture]:
    """Draw a sweep; nothing where no trial was complete."""
    return [_history(result), _settings(result)] if result["best"] is not None else []


def _history(result: Mapping[str, Any]) -> Picture:
    trials = result["trials"]
    complete = [trial for trial in trials if trial["value"] is not None]
    with drawing(columns=2, width=4.8, height=3.4) as canvas:
        left, right = canvas.panels
        numbers, values = ([trial["number"] + 1 for trial in complete], [trial["value"] for trial in complete])
        left.plot(numbers, values, "o", color=COLOURS[0], label="complete")
        left.step(numbers, list(accumulate(values, max)), where="post", color=COLOURS[1], label="best so far")
        cut = [trial["number"] + 1 for trial in trials if trial["state"] == "pruned"]
        if cut:
            low = min(values) - 0.06 * ((max(values) - min(values)) or 1.0)
            left.plot(cut, [low] * len(cut), "x", color=GREY, label="pruned")
        left.set(title="trial by trial", xlabel="trial", ylabel="worth")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend()
        for trial in trials:
            reported = sorted((int(step), value) for step, value in trial["reported"].items())
            if not reported:
                continue
            best = result["best"]["number"] == trial["number"]
            colour = COLOURS[1] if best else COLOURS[0] if trial["value"] is not None else GREY
            right.plot(
                *zip(*reported, strict=True), color=colour, linewidth=2.4 if best else 1.0,
                alpha=1.0 if best else 0.55, zorder=3 if best else 2, marker=None if len(reported) > 1 else ".",
                linestyle="-" if trial["value"] is not None else ":",
            )  # fmt: skip
        right.set(title="round by round", xlabel="round, of one seed after the other", ylabel="worth")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        caption = "What trials were worth. Right: orange is the best trial, dotted grey are those that were pruned."
        return canvas.picture("trials", caption)


def _settings(result: Mapping[str, Any]) -> Picture:
    keys = list(result["plan"]["search"])
    columns = min(_PER_ROW, len(keys))
    rows = -(-len(keys) // columns)
    with drawing(columns=columns, rows=rows, width=3.9, height=3.2) as canvas:
        for key, panel in zip(keys, canvas.panels, strict=False):
            _slice(panel, key, result)
        for panel in canvas.panels[len(keys) :]:
            panel.set_visible(False)
        caption = "What complete trials were worth by each setting, whatever the others were; orange is the best."
        return canvas.picture("settings", caption)


def _slice(panel: Axes, key: str, result: Mapping[str, Any]) -> None:
    best = result["best"]["number"]
    complete = sorted((t for t in result["trials"] if t["value"] is not None), key=lambda t: bool(t["number"] == best))
    values = [trial["params"][key] for trial in complete]
    if any(isinstance(value, str) for value in values):
        names = sorted(set(values))
        panel.set_xticks(range(len(names)), names)
        panel.set_xlim(-0.6, len(names) - 0.4)
        values = [names.index(value) for value in values]
    elif key in result["log"]:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    colours = [COLOURS[1] if trial["number"] == best else COLOURS[0] for trial in complete]
    panel.scatter(values, [trial["value"] for trial in complete], c=colours, s=34, alpha=0.85, zorder=3)
    panel.set(xlabel=key, ylabel="worth")
