"""The report of the baselines."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import ConfigError
from simulations.baselines.baselines import FILE
from simulations.baselines.pictures import baseline_pictures
from simulations.baselines.tables import baseline_head, baseline_rows, overall_rows
from simulations.report.listing import config_listing
from simulations.report.page import Page, Part, Rows
from simulations.study.shown import metric


def baselines_page(folder: Path) -> Page:
    """Return the report of the baselines in ``folder``.

    Raises:
        ConfigError: if they cannot be read.
    """
    try:
        figures = json.loads((folder / FILE).read_text(encoding="utf-8"))
        gains, levels = baseline_pictures(figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / FILE} cannot be read ({type(error).__name__}); expected baselines.") from error
    verdicts = [found["gain"]["verdict"] for found in figures["sites"].values() if found["gain"]]
    head = baseline_head(figures)
    columns = ["over", *head[2 + len(figures["titles"]) :]]
    return Page(
        f"{figures['name']}: does joining beat training alone?",
        f"Joining is better at {verdicts.count('joining')} of {len(verdicts)} sites, training alone at "
        f"{verdicts.count('alone')}; at {verdicts.count('undecided')} the test rows do not decide it.",
        [
            (title, metric(figures["headline"], figures["overall"][name]["value"]))
            for name, title in figures["titles"].items()
        ],
        [
            Part(
                "By site",
                ["The gain is joined minus alone, " + figures["unit"] + "."],
                [Rows(head, baseline_rows(figures), last_is_total=True)],
                [gains, levels],
            ),
            Part(
                "Over all test rows",
                ["What joining gains over each baseline; each site alone answers for its own rows."],
                [Rows(columns, overall_rows(figures))],
            ),
            Part("How to read it", figures["notes"]),
            Part("What is guaranteed", [f"{figures['titles'][n]}: {said}" for n, said in figures["privacy"].items()]),
            Part("Config", listing=config_listing(figures["config"])),
        ],
    )
