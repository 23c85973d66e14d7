"""The live display of a simulation and its closing tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.config.run import RunConfig
from common.tasks.catalog import TASKS
from server.events import Observer
from server.outcome import Outcome

MOST_SITES_SHOWN = 60
"""Sites that the closing table lists."""


class LiveProgress(Observer):
    """Shows rounds, sites, the headline metric, loss, ε and bytes while a run goes on.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._rounds: TaskID | None = None
        self._sites: TaskID | None = None
        self._task = "classification"
        self._metrics: dict[str, float] = {}
        self._bytes, self._since = 0, "so far"
        self._asked = 0

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def run_started(self, config: RunConfig, sites: Sequence[str], completed_rounds: int) -> None:
        """Show the two bars."""
        self._task = config.data.task
        self._rounds = self._progress.add_task(
            "rounds", total=config.federation.rounds, completed=completed_rounds, note=""
        )
        self._sites = self._progress.add_task("sites ", total=len(sites), note="evaluating")
        dp = "no DP" if config.privacy.unit == "none" else f"{config.privacy.unit}-level DP"
        self._since = "since it was resumed" if completed_rounds else "so far"
        again = f", resumed after round {completed_rounds}" if completed_rounds else ""
        self._console.print(f"[bold]{escape(config.name)}[/bold]: {len(sites)} sites, {dp}{again}", highlight=False)

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        """Begin the bar of sites anew."""
        self._asked = len(cohort)
        if self._sites is not None:
            self._progress.reset(self._sites, total=self._asked, note=f"training round {number}")

    def sites_asked(self, number: int, sites: Sequence[str]) -> None:
        """Make the bar of sites longer."""
        self._asked += len(sites)
        if self._sites is not None:
            self._progress.update(self._sites, total=self._asked)

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        """Advance the bar of sites."""
        self._bytes += outcome.bytes_up + outcome.bytes_down
        if self._sites is not None:
            self._progress.advance(self._sites)
            self._progress.update(self._sites, note=f"{site} {outcome.status}")

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """Print the line of the round and advance the bar of rounds."""
        sites = record["sites"].values()
        admitted = sum(outcome["status"] == "admitted" for outcome in sites)
        earlier = record.get("carried", ())
        losses = [outcome["train_loss"] for outcome in (*sites, *earlier) if outcome["train_loss"] is not None]
        parts = [f"round {record['round']}", f"{admitted}/{len(record['sites'])} sites"]
        carried = sum(one["status"] == "admitted" for one in earlier)
        parts += [f"{carried} asked in earlier rounds"] if carried else []
        parts += ["skipped"] if "skipped" in record else []
        parts += [_shown(self._task, self._metrics)] if self._metrics else []
        parts += [f"training loss {mean(losses):.3f}"] if losses else []
        parts += [f"ε {epsilon:.2f}"] if epsilon is not None else []
        parts += [f"{_size(self._bytes)} {self._since}", f"{record['seconds']['total']:.1f} s"]
        parts += [f"{record['simulated_s']['round']:.1f} s simulated"] if "simulated_s" in record else []
        self._metrics = {}
        self._console.print("  " + " · ".join(parts), highlight=False, soft_wrap=True)
        if self._rounds is not None:
            self._progress.advance(self._rounds)
            self._progress.update(self._rounds, note=parts[2] if len(parts) > 2 else "")

    def evaluated(self, record: dict[str, Any]) -> None:
        """Keep the metrics for the next line; print those before the first round."""
        self._metrics = record["metrics"]["overall"]
        if record["round"] == 0:
            self._console.print(f"  before · {_shown(self._task, self._metrics)}", highlight=False, soft_wrap=True)
            self._metrics = {}


def closing_tables(summary: dict[str, Any], task: str) -> list[Table]:
    """Return the tables that end a run: what it did by site, and where the seconds went."""
    before, after = (summary[key].get("test", {}) for key in ("metrics_before", "metrics_after"))
    headline = summary["headline"]
    title = f"{summary['name']}: {headline} by site, {summary['rounds']} rounds; bytes for a site and round"
    whole = summary["site_level"]
    caption = f"whole sites: ε {whole['epsilon']:.2f} at δ {whole['delta']:g}" if whole else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("site", no_wrap=True)
    for column in ("before", "after", "ε spent", "up", "down"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, site: str | None, style: str | None = None) -> None:
        names = [site] if site else list(summary["bytes_up"])
        spent = [summary["epsilon"][s] for s in names if s in summary["epsilon"]]
        table.add_row(
            escape(name), _number(task, _metric(before, site, headline)), _number(task, _metric(after, site, headline)),
            f"{max(spent):.2f}" if spent else "-",
            *(_size(_mean_bytes(summary[key], names)) for key in ("bytes_up", "bytes_down")),
            style=style,
        )  # fmt: skip

    for site in summary["sites"][:MOST_SITES_SHOWN]:
        row(site, site)
    left_out = len(summary["sites"]) - MOST_SITES_SHOWN
    if left_out > 0:
        table.add_row(f"and {left_out:,} more: summary.json")
    table.add_section()
    row("all rows", None, "bold")
    if after.get("worst_site"):
        row(f"worst: {after['worst_site']}", after["worst_site"])
    seconds = Table(title="seconds", title_justify="left")
    for phase in ("setup", "training", "aggregation", "evaluation"):
        seconds.add_column(phase, justify="right")
    seconds.add_column("total", justify="right")
    parts = summary["seconds"]
    shown = [parts[phase] for phase in ("setup", "training", "aggregation", "evaluation")] + [summary["seconds_total"]]
    if "simulated_s" in summary:
        seconds.add_column("rounds, simulated", justify="right")
        shown.append(summary["simulated_s"]["rounds"])
    seconds.add_row(*(f"{value:.1f}" for value in shown))
    return [table, seconds]


def _metric(metrics: dict[str, Any], site: str | None, name: str) -> float | None:
    part = metrics.get("overall", {}) if site is None else metrics.get("by_site", {}).get(site, {})
    value: float | None = part.get(name)
    return value


def _mean_bytes(by_site: dict[str, list[int | None]], names: Sequence[str]) -> float:
    counts = [count for name in names for count in by_site.get(name, []) if count]
    return mean(counts) if counts else 0.0


def _shown(task: str, metrics: dict[str, float]) -> str:
    headline = TASKS[task].headline
    return f"{headline} {_number(task, metrics[headline])}, loss {metrics['loss']:.3f}"


def _number(task: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if TASKS[task].headline == "accuracy" else f"{value:.1f}"


def _size(count: float) -> str:
    for unit in ("B", "kB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} MB"
