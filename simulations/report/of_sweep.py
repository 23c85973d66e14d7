"""The report of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from common.errors import ConfigError
from simulations.report.listing import config_listing
from simulations.report.page import Page, Part, Rows
from simulations.study.shown import metric
from simulations.sweep.files import BEST, RESULT
from simulations.sweep.pictures import sweep_pictures
from simulations.sweep.tables import trial_head, trial_rows


def sweep_page(folder: Path) -> Page:
    """Return the report of the sweep in ``folder``.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        pictures = sweep_pictures(result)
        best_config = (folder / BEST).read_text(encoding="utf-8") if result["best"] is not None else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RESULT} cannot be read ({type(error).__name__}); expected a sweep.") from error
    best, trials = result["best"], result["trials"]
    states = [trial["state"] for trial in trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    facts = [("trials", str(len(trials)))]
    for found in (result["privacy"] or {}).values():
        search = found["epsilon_of_search"]
        facts.append(("ε of the whole search", "∞" if search is None else f"{search:.2f}"))
    if best is not None:
        average = sum(best["headline"]) / len(best["headline"])
        facts = [("best", f"{best['value']:.4f}"), (result["headline"], metric(result["headline"], average)), *facts]
    plan = {key: value for key, value in result["plan"].items() if key != "config"}
    searched = len(result["plan"]["search"])
    return Page(
        f"Sweep of {result['name']}",
        f"{counted}; sampler {plan['sampler']}; judged on {result['judged_on']}.",
        facts,
        [
            Part("What it costs in privacy", result["privacy_said"]),
            Part("Trials", pictures=pictures[:1]),
            Part("Settings", pictures=pictures[1:]),
            Part(
                "All trials",
                tables=[Rows(trial_head(result), trial_rows(result), text_columns=frozenset(range(1, searched + 1)))],
            ),
            Part("Plan", listing=yaml.safe_dump(plan, sort_keys=False, allow_unicode=True)),
            *([Part("Config of the best", listing=config_listing(best_config))] if best_config else []),
        ],
    )
