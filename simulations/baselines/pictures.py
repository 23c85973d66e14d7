"""The pictures of the baselines: what each site gains by joining, and how well every baseline does there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulations.study.shown import shown_metric
from simulations.study.style import COLOURS, GREY, MARKERS, Picture, drawing

COLOUR_OF = {"joining": COLOURS[0], "alone": COLOURS[1], "undecided": GREY}
_SERIES = ("base", "alone", "head_only", "joined", "pooled")
_COLOUR = {"base": GREY, "alone": COLOURS[1], "head_only": COLOURS[3], "joined": COLOURS[0], "pooled": COLOURS[2]}


def baseline_pictures(figures: Mapping[str, Any]) -> list[Picture]:
    """Draw the gains and the levels."""
    return [_gains(figures), _levels(figures)]


def _gains(figures: Mapping[str, Any]) -> Picture:
    sites = {site: found for site, found in figures["sites"].items() if found["gain"] is not None}
    order = sorted(sites, key=lambda site: -float(sites[site]["gain"]["value"]))
    rows = [(f"{site}  ({sites[site]['test_rows']} rows)", sites[site]["gain"]) for site in order]
    rows.append(("all sites", figures["gain_overall"]["alone"]))
    with drawing(width=7.6, height=1.5 + 0.34 * len(rows)) as canvas:
        (panel,) = canvas.panels
        panel.axvline(0, color=GREY, linewidth=1)
        for index, (_, gain) in enumerate(rows):
            colour = COLOUR_OF[gain["verdict"]]
            if gain["low"] is not None:
                panel.plot([gain["low"], gain["high"]], [index, index], color=colour, linewidth=2.2)
            filled = colour if gain["verdict"] != "undecided" else "white"
            panel.plot([gain["value"]], [index], "o", color=colour, markersize=7, markerfacecolor=filled)
        panel.set_yticks(range(len(rows)), [name for name, _ in rows])
        panel.get_yticklabels()[-1].set_fontweight("bold")
        panel.axhline(len(rows) - 1.5, color=GREY, linewidth=0.6)
        panel.set_ylim(len(rows) - 0.5, -1.1)
        panel.grid(visible=False, axis="y")
        panel.set(title="does joining beat training alone?", xlabel=f"gain by joining, {figures['unit']}")
        for where, side in (("right", "← alone is better  "), ("left", "  joining is better →")):
            panel.text(0, -0.75, side, ha=where, va="center", color=GREY, fontsize=9)
        caption = (
            "What each site gains by joining, on its own test rows, mean over seeds with 95 % intervals. Blue: joining "
            "is better; orange: alone is; open and grey: not decided."
        )
        return canvas.picture("gain", caption)


def _levels(figures: Mapping[str, Any]) -> Picture:
    label, factor = shown_metric(figures["headline"])
    sites = [site for site, found in figures["sites"].items() if found["metrics"]]
    with drawing(width=7.6, height=1.9 + 0.42 * (len(sites) + 1)) as canvas:
        (panel,) = canvas.panels
        for index, name in enumerate(name for name in _SERIES if name in figures["titles"]):
            values = [factor * figures["sites"][site]["metrics"][name] for site in sites]
            values.append(factor * figures["overall"][name]["value"])
            panel.plot(
                values, [row + 0.13 * (index - 2) for row in range(len(values))], MARKERS[index], color=_COLOUR[name],
                markersize=6.5,
                label=figures["titles"][name], alpha=0.9, linestyle="none",
            )  # fmt: skip
        panel.set_yticks(range(len(sites) + 1), [*sites, "all rows"])
        panel.get_yticklabels()[-1].set_fontweight("bold")
        panel.axhline(len(sites) - 0.5, color=GREY, linewidth=0.6)
        panel.set_ylim(len(sites) + 0.5, -0.5)
        panel.set(title="every baseline on each site's test rows", xlabel=label)
        canvas.figure.legend(*panel.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        return canvas.picture("levels", f"{label} of every baseline on each site's own test rows, mean over seeds.")
