"""A comparison: every variant with every seed, their figures with intervals, and differences paired by seed.

::

    compare.json      variants, seeds, figures, differences; everything shown is drawn from it and from the runs
    runs/             a run folder a variant and seed
    curves.png, .svg  the headline metric by round, bytes, ε and simulated seconds
    after.png, .svg   the metric after the run, and the paired differences
    report.html       all of it on one page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from common.atomic import write_atomic
from common.config.load import dump_run_config
from common.errors import ConfigError
from common.tasks.catalog import TASKS
from simulations.study.curves import Point, curve
from simulations.study.intervals import over_seeds
from simulations.study.runs import HERE, Compute, PlannedRun, Watching, plan_runs, run_missing, unwatched
from simulations.study.variants import Variant

FILE = "compare.json"


@dataclass(frozen=True)
class Comparison:
    """A comparison whose runs are complete.

    Attributes:
        figures: what ``compare.json`` holds.
        curves: of each variant, the points of every seed's run.
    """

    figures: dict[str, Any]
    curves: dict[str, list[list[Point]]]


def compare(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    *,
    compute: Compute = HERE,
    watching: Watching = unwatched,
) -> Comparison:
    """Run what is missing and compare; write ``compare.json``.

    Args:
        variants: what is compared.
        seeds: the same for all.
        folder: of the comparison; runs that are complete in it are not repeated.
        compute: where the runs compute.
        watching: who is told of each run.

    Raises:
        FedtuneError: for variants that cannot be compared, or whatever keeps a run from completing.
    """
    _expect_comparable(variants)
    planned = plan_runs(folder / "runs", [(variant.label, variant.config) for variant in variants], seeds)
    run_missing(planned, compute=compute, watching=watching)
    figures: dict[str, Any] = {
        "kind": "compare",
        "headline": TASKS[variants[0].config.data.task].headline,
        "higher_is_better": TASKS[variants[0].config.data.task].higher_is_better,
        "seeds": list(seeds),
        "variants": {},
        "differences": [],
    }
    curves = {}
    for variant in variants:
        own = [run for run in planned if run.label == variant.label]
        curves[variant.label] = [curve(run.folder, run.config, figures["headline"]) for run in own]
        figures["variants"][variant.label] = _figures(own, curves[variant.label], figures["headline"])
    figures["differences"] = paired_differences(
        {label: found["per_seed"]["after"] for label, found in figures["variants"].items()}
    )
    write_atomic(folder / FILE, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode())
    return Comparison(figures, curves)


def load_comparison(folder: Path) -> Comparison:
    """Read a comparison that is complete.

    Raises:
        ConfigError: if ``compare.json`` is not readable.
    """
    from common.config.load import load_run_config

    try:
        figures = json.loads((folder / FILE).read_text(encoding="utf-8"))
        curves = {
            label: [
                curve(folder / run, load_run_config(folder / run / "config.yaml"), figures["headline"])
                for run in found["runs"]
            ]
            for label, found in figures["variants"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / FILE} cannot be read ({type(error).__name__}); expected a comparison.") from error
    return Comparison(figures, curves)


def paired_differences(after: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the difference of every two variants, second minus first, with an interval over the seeds they share."""
    found = []
    for first, second in combinations(after, 2):
        estimate = over_seeds([b - a for a, b in zip(after[first], after[second], strict=True)])
        found.append({"first": first, "second": second, **estimate.as_dict()})
    return found


def _figures(runs: Sequence[PlannedRun], curves: Sequence[Sequence[Point]], headline: str) -> dict[str, Any]:
    summaries = [summary for run in runs if (summary := run.summary()) is not None]
    last = [points[-1] for points in curves]
    per_seed: dict[str, list[Any]] = {
        "before": [points[0].headline for points in curves],
        "after": [point.headline for point in last],
        "worst_site": [point.worst for point in last],
        "loss": [point.loss for point in last],
        "megabytes": [point.megabytes for point in last],
        "epsilon": [point.epsilon for point in last],
        "simulated_s": [point.simulated_s for point in last],
        "seconds": [summary["seconds_total"] for summary in summaries],
    }
    return {
        "runs": [f"runs/{run.folder.name}" for run in runs],
        "config": dump_run_config(runs[0].config),
        "privacy_claim": summaries[0]["privacy_claim"],
        "per_seed": per_seed,
        "estimates": {
            name: None if None in values else over_seeds(values).as_dict() for name, values in per_seed.items()
        },
    }


def _expect_comparable(variants: Sequence[Variant]) -> None:
    if not variants:
        raise ConfigError("no variants; expected one or more configs.")
    tasks = {variant.config.data.task for variant in variants}
    if len(tasks) > 1:
        raise ConfigError(f"variants have tasks {', '.join(sorted(tasks))}; expected one, whose metric is compared.")
    for variant in variants:
        data = variant.config.data
        if not variant.config.evaluation.enabled or (data.test is None and data.test_fraction == 0):
            raise ConfigError(
                f"variant {variant.label!r} is never evaluated; expected evaluation.enabled and a test part "
                "(data.test, or data.test_fraction)."
            )
