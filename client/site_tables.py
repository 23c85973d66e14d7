"""The tables that ``fedtune-client`` prints of a site: checks, status, policy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from client.checks.finding import Finding
from client.policy.section import Policy
from client.site_config import Budget, SiteConfig

_COLOURS = {"pass": "green", "fail": "red", "note": "yellow"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return the table of checks."""
    table = Table(title="check", title_justify="left")
    for column in ("what", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        outcome = Text(finding.outcome, style=_COLOURS[finding.outcome])
        table.add_row(escape(finding.what), outcome, escape(finding.found), escape(finding.remedy))
    return table


def status_tables(values: dict[str, Any]) -> Iterator[Table | str]:
    """Yield what is shown of a site's status."""
    running, agent, budget = values["running"], values["agent"], values["budget"]
    if running is None:
        yield f"{values['site']}: nothing started with up runs here."
    else:
        table = Table(title=f"{values['site']}: up, process {running.get('pid')}", title_justify="left")
        for column in ("component", "process", "user", "starts", "last exit"):
            table.add_column(column)
        for name, part in running.get("components", {}).items():
            cells = (name, part["pid"] or "waiting", part["user"] or "-", part["starts"], part["last_exit"])
            table.add_row(*("-" if cell is None else str(cell) for cell in cells))
        yield table
        connection = values["connection"]
        remedy = "" if connection["state"] != "not connected" else "; fedtune-client check looks for the cause"
        yield f"coordinator: {connection['state']}, {connection['said']}{remedy}"
    if agent is None:
        yield "The agent does not answer."
    else:
        yield (
            f"agent: {agent['doing']} for {_ago(agent['since'])}; {agent['messages']} messages, {agent['rounds']} "
            f"rounds, {agent['refusals']} refusals; base model loaded {agent['model_loads']} times, rows "
            f"{agent['data_loads']} times since {_ago(agent['started'])} ago"
        )
        last = agent["last_round"]
        if last is not None:
            yield f"last round: {last['round']} of run {last['run'][:12]}, {_ago(last['time'])} ago"
    spent = values["epsilon_spent"]
    yield f"ε {'unknown' if spent is None else f'{spent:.2f}'} of {budget['epsilon']:g} spent, δ={budget['delta']:g}"
    if values["paused"]:
        yield "The policy has pause: true, so that everything is refused."


def policy_table(site_config: SiteConfig) -> Table:
    """Return the table of a site's rules, budget first."""
    table = Table(title=f"{site_config.name}: what a run may ask for", title_justify="left")
    for column in ("rule", "value", "meaning"):
        table.add_column(column, overflow="fold")
    for name, section, values in (
        ("budget", Budget, site_config.budget.model_dump()),
        ("policy", Policy, site_config.policy.model_dump()),
    ):
        for key, field in section.model_fields.items():
            table.add_row(f"{name}.{key}", escape(_shown(values[key])), escape(field.description or ""))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, tuple | list):
        return ", ".join(_shown(part) for part in value) if value else "none"
    if isinstance(value, dict):
        return " ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
