"""The closing figures of a run, drawn from its metrics log alone."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from common.config.run import RunConfig
from common.errors import RunError
from common.privacy.accounting import Segment, epsilon_spent
from common.privacy.claim import privacy_claim
from common.privacy.planning import plan_site_level
from common.tasks.catalog import TASKS

Record = dict[str, Any]


def epsilon_by_site(rounds: Iterable[dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """Return ε spent by each site that was asked to train, from the mechanisms in the round records.

    A site is charged for being asked: whether its update arrived does not matter, it may have left the site.
    """
    segments: dict[str, list[Segment]] = {}
    for record in rounds:
        for site, outcome in record["sites"].items():
            if outcome["mechanism"] is not None:
                segments.setdefault(site, []).append(Segment(**outcome["mechanism"]))
    return {
        site: epsilon_spent(spent, config.privacy.delta, config.privacy.accountant)
        for site, spent in sorted(segments.items())
    }


def summarise(records: Iterable[Record], config: RunConfig) -> dict[str, Any]:
    """Build ``summary.json``.

    Returns:
        rounds; metrics_before and metrics_after by split (overall, by_site, worst_site), and whether they are personal,
        of each site with the factors that it keeps; epsilon and the bytes up and
        down of each site (bytes as lists, one number a round, None where nothing passed); products, what the
        aggregation did in each round, with the median and the largest of the sites' update norms (see
        server.aggregation.products; None where it is withheld); site_level, the ε and δ spent on whole sites, or None;
        seconds by phase; simulated_s where the rounds have it; the engine, the privacy claim and the fingerprint of the
        base model.

    Raises:
        RunError: for a log without a start.
    """
    starts, rounds = [], []
    metrics: dict[int, dict[str, Any]] = {}
    evaluating, personal = 0.0, False
    for record in records:
        if record["kind"] == "start":
            starts.append(record)
        elif record["kind"] == "round":
            rounds.append(record)
        elif record["kind"] == "evaluation":
            evaluating += record["seconds"]
            personal = bool(record.get("personal"))
            if record["round"] != 0:  # with thousands of sites an evaluation is megabytes: the first and the last stay
                metrics = {known: kept for known, kept in metrics.items() if known == 0}
            metrics[record["round"]] = {record["split"]: record["metrics"]}
    if not starts:
        raise RunError("metrics.jsonl has no start record; expected the log of a run.")
    sites = sorted({site for record in rounds for site in record["sites"]})

    seconds = {
        "setup": sum(record["seconds"] for record in starts),
        "rounds": sum(record["seconds"]["total"] for record in rounds),
        "training": sum(record["seconds"]["training"] for record in rounds),
        "aggregation": sum(record["seconds"]["aggregation"] for record in rounds),
        "evaluation": evaluating,
    }
    first, last = starts[0], starts[-1]
    return {
        "name": config.name,
        "rounds": len(rounds),
        "sites": sorted({*first["sites"], *sites}),
        "headline": TASKS[config.data.task].headline,
        "metrics_before": metrics.get(0, {}),
        "metrics_after": metrics.get(len(rounds), {}),
        "personal": personal,
        "epsilon": epsilon_by_site(rounds, config),
        "delta": config.privacy.delta if config.privacy.is_local else None,
        "site_level": _site_level(config, len(first["sites"]), len(rounds)),
        "privacy_claim": privacy_claim(config, bool(first["repeatable_noise"])),
        "products": _products(rounds),
        "bytes_up": _bytes(rounds, sites, "bytes_up"),
        "bytes_down": _bytes(rounds, sites, "bytes_down"),
        "seconds_total": seconds["setup"] + seconds["rounds"] + seconds["evaluation"],
        "seconds_training": seconds["training"],
        "seconds_evaluation": seconds["evaluation"],
        "seconds": seconds,
        "engine": last["engine"],
        "device": last["device"],
        "starts": len(starts),
        **_simulated_seconds(rounds),
        "base_fingerprint": first["base_fingerprint"],
        "versions": last["versions"],
    }


def _products(rounds: list[Record]) -> dict[str, list[float | None]]:
    """Return the measures of the aggregation by round; of the update norms, which are by site, median and largest."""
    known = [record["products"] or {} for record in rounds]
    norms = [[*one.get("update_norms", {}).values()] for one in known]
    return {
        **{key: [one.get(key) for one in known] for key in ("error", "drift", "cosine_mean", "cosine_min")},
        "update_norm_median": [median(own) if own else None for own in norms],
        "update_norm_max": [max(own, default=None) for own in norms],
    }


def _bytes(rounds: list[Record], sites: list[str], key: str) -> dict[str, list[int | None]]:
    """Return bytes by site and round, where they passed; None where none did."""
    found: dict[str, list[int | None]] = {site: [] for site in sites}
    for record in rounds:
        late: dict[str, int] = {}
        for one in record.get("carried", ()):
            late[one["site"]] = late.get(one["site"], 0) + one[key]
        for site in sites:
            own = record["sites"].get(site, {}).get(key)
            found[site].append(own + late.get(site, 0) if own is not None else late.get(site))
    return found


def _simulated_seconds(rounds: list[Record]) -> dict[str, Any]:
    """Return the totals of simulated seconds: of all rounds, and of each site that answered in any of them."""
    noted = [record["simulated_s"] for record in rounds if "simulated_s" in record]
    if not noted:
        return {}
    sites = sorted({site for known in noted for site in known["sites"]})
    parts = ("compute", "up", "down")
    return {
        "simulated_s": {
            "rounds": sum(known["round"] for known in noted),
            "sites": {
                site: {part: sum(known["sites"].get(site, {}).get(part, 0.0) for known in noted) for part in parts}
                for site in sites
            },
        }
    }


def _site_level(config: RunConfig, num_sites: int, rounds: int) -> dict[str, float] | None:
    """Return ε and δ spent on whole sites after ``rounds``, None without site-level privacy."""
    mechanism = plan_site_level(config, num_sites)
    if mechanism is None:
        return None
    return {"epsilon": mechanism.epsilon_after(rounds), "delta": mechanism.delta}
