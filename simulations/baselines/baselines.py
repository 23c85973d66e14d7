"""Does joining beat training alone? The federation against its baselines, by site, with intervals.

::

    baselines.json    every figure; everything shown is drawn from it
    gain.png, .svg    what each site gains by joining
    levels.png, .svg  every baseline on each site's test part
    report.html       all of it on one page
    runs/, scores/    the federated runs, and what every test row adds to the metrics under each adapter
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import write_atomic
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ConfigError
from common.privacy.claim import privacy_claim
from common.tasks.catalog import TASKS
from simulations.baselines.alone import pooled_config
from simulations.baselines.scores import MEASURES, Scores, each_at_home
from simulations.baselines.work import (
    ALONE,
    BASE,
    HEAD_ONLY,
    JOINED,
    NAMES,
    POOLED,
    TITLES,
    Work,
    do_work,
    plan_work,
    scores_of,
)
from simulations.study.intervals import mcnemar, over_seeds, paired_gain
from simulations.study.runs import HERE, Compute, Watching, unwatched

FILE = "baselines.json"
SMALL = 50
"""Test rows of a site below which its interval is called wide."""

BySeed = list[dict[str, Any]]


def run_baselines(
    configs: Mapping[str, RunConfig],
    seeds: Sequence[int],
    folder: Path,
    *,
    compute: Compute = HERE,
    watching: Watching = unwatched,
    saying: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train what is missing, compare, and write ``baselines.json``.

    Args:
        configs: of each baseline, as :func:`simulations.baselines.work.baseline_configs` gives them or changed in what
            is trained; data are the same in all.
        seeds: of the runs.
        folder: of the baselines; what is complete in it is not repeated.
        compute: where runs and the rest compute.
        watching: who is told of the federated runs.
        saying: told of everything else as it begins.

    Raises:
        FedtuneError: for a config without a test part, or whatever keeps a run from completing.
    """
    _expect_paired(configs)
    work = plan_work(configs, seeds, folder)
    do_work(work, folder, compute=compute, watching=watching, saying=saying)
    figures = _figures(configs, seeds, _loaded(work, seeds))
    write_atomic(folder / FILE, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode())
    return figures


def _expect_paired(configs: Mapping[str, RunConfig]) -> None:
    joined = configs[JOINED]
    if joined.data.test is None and joined.data.test_fraction == 0:
        raise ConfigError("the config has no test part; expected data.test or data.test_fraction. Add one.")
    for name, config in configs.items():
        if config.data != joined.data or config.model != joined.model:
            raise ConfigError(
                f"baseline {name!r} has other data or another base model; expected the same, so that rows can be "
                "paired. Change training, privacy, adapter or federation alone."
            )


def _loaded(work: Sequence[Work], seeds: Sequence[int]) -> dict[str, BySeed]:
    """Return, for each baseline and seed, the scores of its adapter; for ``alone`` by site."""
    loaded: dict[str, BySeed] = {}
    for name in dict.fromkeys(one.name for one in work):
        loaded[name] = [
            {one.site or "": scores_of(one) for one in work if one.name == name and one.config.seed == seed}
            for seed in seeds
        ]
    return loaded


def _figures(configs: Mapping[str, RunConfig], seeds: Sequence[int], loaded: Mapping[str, BySeed]) -> dict[str, Any]:
    config = configs[JOINED]
    task = TASKS[config.data.task]
    datas = [load_federated_data(config.data, seed) for seed in seeds]
    shared = all(data.test == datas[0].test for data in datas)
    at_home = [each_at_home(scores) for scores in loaded[ALONE]]
    scores = {name: [by[""] for by in loaded[name]] for name in loaded if name != ALONE} | {ALONE: at_home}
    names = [name for name in NAMES if name in scores]
    sites = {}
    for site in datas[0].sites:
        rows = [int(joined.rows_of(site).sum()) for joined in scores[JOINED]]
        if min(rows) == 0:
            sites[site] = {"test_rows": 0, "train_rows": len(datas[0].train[site]), "metrics": {}, "gain": None}
            continue
        sites[site] = {
            "test_rows": rows[0],
            "train_rows": len(datas[0].train[site]),
            "metrics": {name: _mean_metric(scores[name], site, task.headline) for name in names},
            "alone_on_all": _mean_metric([by[site] for by in loaded[ALONE]], None, task.headline),
            "gain": _gain(scores[JOINED], at_home, site, shared),
        }
    return {
        "kind": "baselines",
        "name": config.name,
        "headline": task.headline,
        "higher_is_better": task.higher_is_better,
        "unit": MEASURES[config.data.task].unit,
        "seeds": list(seeds),
        "same_test_rows": shared,
        "titles": {name: TITLES[name] for name in names},
        "overall": {name: _over_seeds(scores[name], task.headline) for name in names},
        "gain_overall": {
            name: _gain([_like(joined, other) for joined, other in zip(scores[JOINED], scores[name], strict=True)],
                        scores[name], None, shared)
            for name in names if name != JOINED
        },
        "sites": sites,
        "privacy": _privacy(configs, seeds[0]),
        "notes": _notes(config, seeds, sites, shared),
        "config": dump_run_config(config),
    }  # fmt: skip


def _like(scores: Scores, other: Scores) -> Scores:
    """Return the rows of ``scores`` that ``other`` has too: rows of sites that train nothing have no adapter alone."""
    if len(scores.owners) == len(other.owners):
        return scores
    kept = set(other.owners)
    chosen = np.array([owner in kept for owner in scores.owners])
    return Scores(scores.task, scores.sums[chosen], tuple(owner for owner in scores.owners if owner in kept))


def _gain(joined: Sequence[Scores], other: Sequence[Scores], site: str | None, shared: bool) -> dict[str, Any]:
    """Return what joining gains over another adapter on a site's test rows, above 0 where joining is better."""
    measure = MEASURES[joined[0].task]
    differences, weights = [], []
    for ours, theirs in zip(joined, other, strict=True):
        mine, alone = (measure.sign * one.column(measure.sum_name)[one.rows_of(site)] for one in (ours, theirs))
        differences.append(mine - alone)
        weights.append(ours.column(measure.weight)[ours.rows_of(site)])
    estimate = paired_gain(differences, weights, shared_rows=shared, binary=measure.binary).scaled(measure.factor)
    return {
        **estimate.as_dict(),
        "p": mcnemar(differences) if measure.binary else None,
        "verdict": {1: "joining", -1: "alone", 0: "undecided"}[estimate.verdict],
    }


def _mean_metric(scores: Sequence[Scores], site: str | None, headline: str) -> float:
    found = [metrics[headline] for one in scores if (metrics := one.metrics(site)) is not None]
    return float(np.mean(found))


def _over_seeds(scores: Sequence[Scores], headline: str) -> dict[str, Any]:
    found = [metrics[headline] for one in scores if (metrics := one.metrics()) is not None]
    return over_seeds(found).as_dict()


def _privacy(configs: Mapping[str, RunConfig], seed: int) -> dict[str, str]:
    """Return what each baseline guarantees, in a sentence or two."""
    said = {BASE: "Nothing was trained, so nothing is given away."}
    for name in (HEAD_ONLY, JOINED):
        if name in configs:
            said[name] = privacy_claim(configs[name], repeatable_noise=True)
    alone = configs[ALONE]
    said[ALONE] = (
        "No noise: the adapter of a site says of its records what training left in it, to whoever gets it."
        if alone.privacy.unit == "none"
        else "The same ε and δ as in the federation, against whoever gets the site's adapter. A site that keeps its "
        "adapter to itself needs no noise, and would do better alone than here: see --change alone:KEY=VALUE."
    )
    config = configs[POOLED]
    pooled = pooled_config(config, load_federated_data(config.data, seed))
    curator = "whoever pools the rows sees all of them: this bound needs a trusted curator, which no federation needs."
    if pooled.privacy.unit == "none":
        said[POOLED] = f"No noise, and {curator}"
    else:
        said[POOLED] = (
            f"ε and δ as configured, planned for the pool, against whoever gets the adapter alone; {curator} One "
            f"{'person' if pooled.privacy.unit == 'user' else 'record'} among those of all sites is easier to hide "
            f"(sample rate {pooled.privacy.sample_rate:.3g} over {pooled.training.local_steps} steps a round), so the "
            "same ε costs less accuracy."
        )
    return said


def _notes(config: RunConfig, seeds: Sequence[int], sites: Mapping[str, Any], shared: bool) -> list[str]:
    notes = [
        "Intervals are 95 % each, one site at a time: among many sites one in twenty is called wrongly by chance.",
        "They are of paired differences on a site's test rows (adjusted Wald for right and wrong answers, Agresti and "
        "Min 2005; t otherwise)" + (", with the spread over seeds added." if len(seeds) > 1 else "."),
    ]
    if len(seeds) == 1:
        notes.append("One seed: the intervals speak of other test rows, not of another run. Use --seeds 3 or more.")
    if not shared:
        notes.append("Sites and test rows change with the seed here, so that rows are paired within a seed only.")
    small = [site for site, found in sites.items() if 0 < found["test_rows"] < SMALL]
    if small:
        notes.append(f"{len(small)} of {len(sites)} sites have fewer than {SMALL} test rows: their intervals are wide.")
    if config.federation.sites_per_round is not None:
        notes.append("A site alone trains in every round; in the federation it is asked in some.")
    if config.simulation is not None:
        notes.append("A site alone, and the pool, meet none of the faults that the simulation puts on sites.")
    if config.data.task == "classification":
        notes.append("The base model as it is has an untrained head: its accuracy is that of guessing.")
    notes.append("Settings are those of the run config for all; none was tuned for its baseline (--change does that).")
    return notes
