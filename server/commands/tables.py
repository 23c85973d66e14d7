"""Tables of runs and rounds for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.outcome import bytes_passed

MOST_SITES_SHOWN = 60


def runs_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table of runs; see :func:`server.run_view.run_line`."""
    table = Table("run", "state", "rounds", "submissions", "asked", title="runs", title_justify="left")
    for run in runs:
        state = "running" if run["live"] else run["state"]
        if run["reason"]:
            state += f": {run['reason']}"
        table.add_row(
            escape(run["run"]), escape(state), f"{run['completed_rounds']}/{run['rounds']}", str(run["submissions"]),
            run["asked"],
        )  # fmt: skip
    return table


def view_table(view: dict[str, Any]) -> Table:
    """Return a table of where a run stands; see RunView in control.proto."""
    table = Table("site", "this round", "after", "up", "down", title=escape(view_line(view)), title_justify="left")
    for site in view["sites"][:MOST_SITES_SHOWN]:
        after = site["answered_after_s"]
        why = f": {site['reason']}" if site["reason"] else ""
        shown = "has not answered" if site["status"] == "asked" else site["status"] + why
        table.add_row(
            escape(site["site"]), escape(shown), "-" if after is None else f"{after:.1f} s",
            size(site["bytes_up"]), size(site["bytes_down"]),
        )  # fmt: skip
    left = len(view["sites"]) - MOST_SITES_SHOWN
    notes = [f"and {left:,} more sites; --json lists all"] if left > 0 else []
    notes += [f"left out: {escape(reason)}" for reason in view.get("left_out", ())]
    table.caption = "\n".join(notes) or None
    return table


def view_line(view: dict[str, Any]) -> str:
    """Return one line on where a run stands."""
    parts = [view["run"], view["ended"] or view["phase"], f"round {view['round']}/{view['rounds']}"]
    if view["round_elapsed_s"] is not None:
        parts.append(f"{view['round_elapsed_s']:.0f} of {view['round_timeout_s']:.0f} s")
    asked = [site for site in view["sites"] if site["status"] != "idle"]
    answered = [site for site in asked if site["status"] not in ("asked", "late", "spare")]
    if asked:
        parts.append(f"{len(answered)}/{len(asked)} sites answered")
    parts += [f"{name} {value:.3f}" for name, value in sorted(view["metrics"].items())]
    if view["epsilon"] is not None:
        parts.append(f"ε {view['epsilon']:.2f}")
    parts.append(f"{size(view['bytes_up'])} up, {size(view['bytes_down'])} down")
    if view["paused"]:
        parts.append("paused")
    if view["stops_after_round"]:
        parts.append("stops after this round")
    if view["reason"]:
        parts.append(view["reason"])
    return " · ".join(parts)


def rounds_table(rounds: Sequence[dict[str, Any]]) -> Table:
    """Return a table of complete rounds."""
    table = Table("round", "admitted", "lost", "metrics", "up", "down", "seconds")
    for record in rounds:
        sites = record["sites"]
        lost = [f"{name} {s['status']}" for name, s in sites.items() if s["status"] != "admitted"]
        metrics = record["metrics"] or {}
        table.add_row(
            str(record["round"]), str(len(sites) - len(lost)), escape(", ".join(lost)) or "-",
            ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items())) or "-",
            size(bytes_passed(record, "bytes_up")), size(bytes_passed(record, "bytes_down")),
            f"{record['seconds']['total']:.1f}",
        )  # fmt: skip
    return table


def size(count: float) -> str:
    """Return bytes in a unit that reads well."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
