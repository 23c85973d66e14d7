"""How a run came along, drawn from its metrics log: the headline metric against rounds, bytes, ε and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.privacy.planning import plan_site_level
from common.run_folder import RunFolder
from server.outcome import bytes_passed
from server.summary import epsilon_by_site


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Attributes:
        round: after which it was made; 0 is before the first.
        headline: the task's headline metric over all rows.
        worst: the same of the worst site.
        loss: mean loss over all rows, nats.
        megabytes: up and down, all sites, so far; units of 1e6 bytes.
        epsilon: largest ε spent at any site, or on whole sites where only those are protected; None without privacy.
        simulated_s: simulated seconds so far; None where nothing takes simulated time.
    """

    round: int
    headline: float
    worst: float | None
    loss: float
    megabytes: float
    epsilon: float | None
    simulated_s: float | None


def curve(folder: Path, config: RunConfig, headline: str) -> list[Point]:
    """Return the evaluations of a run in order.

    Args:
        folder: the run folder.
        config: its run config.
        headline: name of the metric.
    """
    records = RunFolder(folder).records()
    rounds = [record for record in records if record["kind"] == "round"]
    sent = [0.0, *accumulate(_megabytes(record) for record in rounds)]
    clock = [0.0, *accumulate(record.get("simulated_s", {}).get("round", 0.0) for record in rounds)]
    sites = next((len(record["sites"]) for record in records if record["kind"] == "start"), 0)
    points = {}
    for record in records:
        if record["kind"] != "evaluation" or record["split"] != "test":
            continue
        number, metrics = record["round"], record["metrics"]
        worst = metrics["by_site"].get(metrics["worst_site"], {}).get(headline)
        points[number] = Point(
            number, metrics["overall"][headline], worst, metrics["overall"]["loss"], sent[number],
            epsilon_after(rounds[:number], config, sites), clock[number] if clock[-1] > 0 else None,
        )  # fmt: skip
    return [points[number] for number in sorted(points)]


def epsilon_after(rounds: list[dict[str, Any]], config: RunConfig, num_sites: int) -> float | None:
    """Return the largest ε that some rounds spent: at a site, or, where sites spend none, on a whole site."""
    if config.privacy.unit == "none":
        return None
    if not rounds:
        return 0.0
    at_sites = epsilon_by_site(rounds, config)
    if at_sites:
        return max(at_sites.values())
    mechanism = plan_site_level(config, num_sites)
    return None if mechanism is None else mechanism.epsilon_after(len(rounds))


def _megabytes(record: dict[str, Any]) -> float:
    return (bytes_passed(record, "bytes_up") + bytes_passed(record, "bytes_down")) / 1e6
