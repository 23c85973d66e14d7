"""What a search costs in privacy: every trial learns from the same records.

Trials compose. Who chooses among private runs by how well they did, and gives out the best, has given out something of
all of them: the ε of the best run alone is not the ε of what is given out. Plain composition adds the mechanisms of all
trials up (Papernot and Steinke 2110.03620 do better with a random number of trials; see :data:`NOT_INCLUDED`).

A record is at the same site in runs that deal rows alike, so that what a site spent in all of them is what its records
spent. Where rows are dealt anew, by a seed or by a partition that is searched, a site of that name has other records:
a record may have been at the site that spent most every time. Each way of dealing then has its own largest ε, at δ
divided by their number k, and these are added: basic composition, Dwork et al. 2006 (k mechanisms of (ε_i, δ / k) are
(Σ ε_i, δ) together).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.privacy.accounting import Segment, epsilon_spent, merge
from common.privacy.planning import plan_site_level
from common.run_folder import RunFolder

MANY = 6
"""Distinct segments above which RDP composes them: also an upper bound, looser, and PRV would take minutes."""

_SAME_SITE = {"max_length": 128, "prompt_template": "{prompt}"}
"""Keys of the data that change how a row is read, not whose it is, each at one value for all."""

Spent = dict[str, list[Segment]]
"""What was done to those who are protected, by their name."""

NOT_INCLUDED = (
    "That ε does not include the choice among trials. Claim the ε of the whole search, or search on rows that are not "
    "protected; a tighter claim needs a random number of trials of which only the best is given out (Papernot and "
    "Steinke 2110.03620), which this sweep does not do, and would not cover the other trials, which lie in its folder."
)


def search_cost(
    runs: Sequence[tuple[RunConfig, Path]], best: Sequence[tuple[RunConfig, Path]]
) -> dict[str, Any] | None:
    """Return what all runs of a search spend together, beside the runs of the best trial.

    Args:
        runs: config and folder of every run of every trial, those cut short included.
        best: those of the best trial.

    Returns:
        for what is protected, "site_records" or "whole_sites": ``epsilon_of_best`` (one run, the largest), ``epsilon_
        of_search`` under plain composition, ``delta``, ``runs`` and ``deals``, the ways in which rows were dealt to
        sites; None where no run has privacy. A run without any privacy among them makes the ε of the search infinite,
        given as None.
    """
    started = [(config, folder) for config, folder in runs if RunFolder(folder).records()]
    if all(config.privacy.unit == "none" for config, _ in started):
        return None
    cost: dict[str, Any] = {}
    for what, segments_of in (("site_records", _at_sites), ("whole_sites", _on_sites)):
        protected = [run for run in started if segments_of(*run)]
        if not protected:
            continue
        bare = len(protected) < len(started)
        delta = min(_delta(config, what) for config, _ in protected)
        rdp = any(config.privacy.accountant == "rdp" for config, _ in protected)
        alike: dict[object, list[Spent]] = {}
        for run in protected:
            # A whole site may be any: the mechanism of the coordinator is the same for all, however rows are dealt.
            alike.setdefault(_dealing(run[0]) if what == "site_records" else None, []).append(segments_of(*run))
        cost[what] = {
            "epsilon_of_best": max((_spent([segments_of(*run)], delta, rdp=rdp) for run in best), default=None),
            "epsilon_of_search": (
                None if bare else sum(_spent(parts, delta / len(alike), rdp=rdp) for parts in alike.values())
            ),
            "delta": delta,
            "runs": len(started),
            "deals": len(alike),
        }
    return cost


def cost_sentences(cost: dict[str, Any] | None, judged_on: str) -> list[str]:
    """Return the cost of a search in sentences.

    Args:
        cost: of :func:`search_cost`.
        judged_on: the rows that trials were judged on, for people.
    """
    judged = f"Trials were judged on {judged_on}, without noise: nothing is guaranteed to those rows."
    if cost is None:
        return ["No trial had differential privacy, so none was spent: the search may tell anything of the records."]
    said = []
    for what, found in cost.items():
        whose = "records" if what == "site_records" else "whole sites"
        search = found["epsilon_of_search"]
        whole = "has no bound, since some had no noise" if search is None else f"is ε = {search:.2f}"
        if found["deals"] > 1:
            whole += f" (rows were dealt to sites in {found['deals']} ways, whose largest ε are added up)"
        best = found["epsilon_of_best"]
        alone = "" if best is None else f" The best trial alone spent ε = {best:.2f} for a run."
        said.append(
            f"Privacy of the whole search for {whose}: {found['runs']} runs on the same {whose}, those cut short "
            f"included; under plain composition that {whole} at δ = {found['delta']:g}.{alone}"
        )
    return [*said, NOT_INCLUDED, judged]


def _dealing(config: RunConfig) -> object:
    """Return what decides at which site a record is: equal for runs in which it is at the same."""
    data = config.data.model_copy(update=_SAME_SITE)
    return data, None if data.partition.kind == "column" else config.seed


def _at_sites(config: RunConfig, folder: Path) -> Spent:
    found: Spent = {}
    for record in RunFolder(folder).records():
        if record["kind"] == "round":
            for site, outcome in record["sites"].items():
                if outcome["mechanism"] is not None:
                    found.setdefault(site, []).append(Segment(**outcome["mechanism"]))
    return found


def _on_sites(config: RunConfig, folder: Path) -> Spent:
    records = RunFolder(folder).records()
    sites = next((len(record["sites"]) for record in records if record["kind"] == "start"), 0)
    mechanism = plan_site_level(config, sites) if sites else None
    rounds = sum(record["kind"] == "round" for record in records)
    return {} if mechanism is None else {"any site": [mechanism.segment(rounds)]}


def _spent(parts: Sequence[Spent], delta: float, *, rdp: bool) -> float:
    """Return the largest ε over who is protected, all parts composed."""
    together: Spent = {}
    for part in parts:
        for who, segments in part.items():
            together.setdefault(who, []).extend(segments)
    return max(
        (
            epsilon_spent(segments, delta, "rdp" if rdp or len(merge(segments)) > MANY else "prv")
            for segments in together.values()
        ),
        default=0.0,
    )


def _delta(config: RunConfig, what: str) -> float:
    settings = config.privacy.site_level_settings
    return settings.delta if what == "whole_sites" and settings is not None else config.privacy.delta
