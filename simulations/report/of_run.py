"""The report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.run_folder import RunFolder
from simulations.report.listing import config_listing
from simulations.report.page import Page, Part, Rows
from simulations.study.curves import Point, curve
from simulations.study.shown import NOTHING, metric, shown_metric
from simulations.study.style import COLOURS, GREY, Picture, drawing, look

MOST_NOT_COUNTED = 200
"""Most rows on what did not count."""


def run_page(folder: Path) -> Page:
    """Return the report of the run in ``folder``, drawn from its config, summary and metrics log.

    Raises:
        ConfigError: if the folder cannot be read.
    """
    files = RunFolder(folder)
    try:
        summary = json.loads(files.summary.read_text(encoding="utf-8"))
        config = load_run_config(files.config)
        points = curve(folder, config, summary["headline"])
        records = files.records()
        return _page(config, summary, points, records, files.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} cannot be read ({type(error).__name__}); expected a complete run.") from error


def _page(
    config: RunConfig, summary: dict[str, Any], points: list[Point], records: list[dict[str, Any]], text: str
) -> Page:
    headline = summary["headline"]
    last = points[-1] if points else None
    spent = max(summary["epsilon"].values(), default=None)
    whole = summary["site_level"]
    facts = [
        (f"{headline} before", metric(headline, points[0].headline if points else None)),
        (f"{headline} after", metric(headline, last.headline if last else None)),
        ("worst site", metric(headline, last.worst if last else None)),
        ("ε spent, the most at a site", NOTHING if spent is None else f"{spent:.2f}"),
        *([("ε spent on whole sites", f"{whole['epsilon']:.2f}")] if whole else []),
        ("MB up and down", f"{_megabytes(summary):.2f}"),
        ("seconds", f"{summary['seconds_total']:.1f}"),
        *([("simulated seconds", f"{last.simulated_s:.1f}")] if last and last.simulated_s is not None else []),
    ]
    rounds = [record for record in records if record["kind"] == "round"]
    pictures = [_course(points, summary), _levels(summary)] if points else []
    return Page(
        f"Run {config.name}",
        f"{len(summary['sites'])} sites, {summary['rounds']} rounds, method {config.aggregation.method}, adapter "
        f"{config.adapter.kind}; engine {summary['engine']} on {summary['device']}, seed {config.seed}.",
        facts,
        [
            Part("What is guaranteed", [summary["privacy_claim"]]),
            Part("On the way", tables=[_by_round(rounds, points, headline)], pictures=pictures[:1]),
            *_not_counted(rounds),
            Part("By site", tables=[_by_site(summary)], pictures=pictures[1:]),
            Part("Seconds", tables=[_seconds(summary)]),
            Part("Config", listing=config_listing(text)),
        ],
    )


def _megabytes(summary: dict[str, Any]) -> float:
    return sum(n or 0 for key in ("bytes_up", "bytes_down") for by in summary[key].values() for n in by) / 1e6


def _by_round(rounds: list[dict[str, Any]], points: list[Point], headline: str) -> Rows:
    found = {point.round: point for point in points}
    body = []
    for number in range(len(rounds) + 1):
        point, record = found.get(number), rounds[number - 1] if number else None
        sites = list(record["sites"].values()) if record else []
        late = record.get("carried", []) if record else []
        carried = sum(one["status"] == "admitted" for one in late)
        admitted = f"{sum(one['status'] == 'admitted' for one in sites)}/{len(sites)}" if record else NOTHING
        admitted += f" + {carried} late" if carried else ""
        sent = sum(one["bytes_up"] + one["bytes_down"] for one in [*sites, *late]) / 1e6
        body.append(
            [
                str(number), admitted, metric(headline, point.headline if point else None),
                metric(headline, point.worst if point else None), f"{point.loss:.3f}" if point else NOTHING,
                f"{point.epsilon:.2f}" if point and point.epsilon is not None else NOTHING,
                f"{sent:.2f}" if record else NOTHING,
                f"{record['seconds']['total']:.1f}" if record else NOTHING,
            ]
        )  # fmt: skip
    return Rows(["round", "admitted", headline, "worst site", "loss", "ε so far", "MB", "seconds"], body)


def _not_counted(rounds: list[dict[str, Any]]) -> list[Part]:
    """Return what did not count and why, by site and kind of reason; nothing where all counted."""
    found: dict[tuple[str, str, str], tuple[str, list[int]]] = {}
    for record in rounds:
        told = [*record["sites"].items(), *((one["site"], one) for one in record.get("carried", []))]
        for site, outcome in told:
            if outcome["status"] != "admitted":
                why = outcome["reason"] or NOTHING
                key = (site, outcome["status"], why.partition(":")[0])
                found.setdefault(key, (why, []))[1].append(record["round"])
    if not found:
        return []
    body = [
        [
            *key[:2],
            why,
            str(numbers[0]) if len(numbers) == 1 else f"{len(numbers)} from {numbers[0]} to {numbers[-1]}",
        ]
        for key, (why, numbers) in sorted(found.items())[:MOST_NOT_COUNTED]
    ]
    more = len(found) - len(body)
    rows = Rows(["site", "what became of it", "why, the first time", "rounds"], body, text_columns=frozenset({0, 1, 2}))
    return [Part("What did not count", [f"And {more:,} more: metrics.jsonl."] if more else [], tables=[rows])]


def _by_site(summary: dict[str, Any]) -> Rows:
    headline = summary["headline"]
    before, after = (summary[key].get("test", {}).get("by_site", {}) for key in ("metrics_before", "metrics_after"))

    def megabytes(key: str, site: str) -> str:
        return f"{sum(count or 0 for count in summary[key].get(site, [])) / 1e6:.2f}"

    body = [
        [
            site, *(metric(headline, part.get(site, {}).get(headline)) for part in (before, after)),
            f"{summary['epsilon'][site]:.2f}" if site in summary["epsilon"] else NOTHING,
            megabytes("bytes_up", site), megabytes("bytes_down", site),
        ]
        for site in summary["sites"]
    ]  # fmt: skip
    return Rows(["site", "before", "after", "ε spent", "MB up", "MB down"], body)


def _seconds(summary: dict[str, Any]) -> Rows:
    phases = ("setup", "training", "aggregation", "evaluation")
    cells = [f"{summary['seconds'][phase]:.1f}" for phase in phases]
    return Rows([*phases, "total"], [[*cells, f"{summary['seconds_total']:.1f}"]], text_columns=frozenset())


def _course(points: list[Point], summary: dict[str, Any]) -> Picture:
    label, factor = shown_metric(summary["headline"])
    private = all(point.epsilon is not None for point in points)
    with drawing(columns=2 if private else 1, width=4.6, height=3.2) as canvas:
        sides = [("rounds", [float(point.round) for point in points])]
        if private:
            sides.append(("ε spent, the most at any site", [point.epsilon or 0.0 for point in points]))
        for panel, (unit, along) in zip(canvas.panels, sides, strict=True):
            panel.plot(along, [factor * point.headline for point in points], label="all rows", **look(0))
            if all(point.worst is not None for point in points):
                panel.plot(along, [factor * (point.worst or 0.0) for point in points], label="worst site", **look(1))
            panel.set(xlabel=unit, ylabel=label)
        canvas.panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.panels[0].legend()
        return canvas.picture("course", f"{label} on the test rows, over all rows and at the site that is worst then.")


def _levels(summary: dict[str, Any]) -> Picture:
    label, factor = shown_metric(summary["headline"])
    headline = summary["headline"]
    before, after = (summary[key]["test"]["by_site"] for key in ("metrics_before", "metrics_after"))
    sites = [site for site in sorted(after, key=lambda site: -after[site][headline]) if site in before]
    with drawing(width=7.2, height=1.3 + 0.3 * len(sites)) as canvas:
        (panel,) = canvas.panels
        for row, site in enumerate(sites):
            ends = [factor * part[site][headline] for part in (before, after)]
            panel.plot(ends, [row, row], color=GREY, linewidth=1.2)
            panel.plot(ends[0], row, "o", color=GREY, markerfacecolor="white", label="before" if row == 0 else None)
            panel.plot(ends[1], row, "o", color=COLOURS[0], label="after" if row == 0 else None)
        panel.set_yticks(range(len(sites)), sites)
        panel.set_ylim(len(sites) - 0.5, -0.5)
        panel.grid(visible=False, axis="y")
        panel.set_xlabel(f"{label}, each site's own test rows")
        canvas.figure.legend(*panel.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return canvas.picture("sites", f"{label} of each site's own test rows before and after the run.")
