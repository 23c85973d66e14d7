"""The report of the baselines."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import ConfigError
from simulations.baselines.baselines import FILE
from simulations.baselines.pictures import baseline_pictures
from simulations.baselines.tables import gain_head, gain_rows, level_head, level_rows, overall_rows
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
    text = frozenset({0, len(gain_head(figures, "")) - 1})
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
                "Does joining beat training alone?",
                ["The gain is that of joining over training alone, with its 95 % interval."],
                [Rows(gain_head(figures, "site"), gain_rows(figures), last_is_total=True, text_columns=text)],
                [gains],
            ),
            Part(
                "How well every baseline does",
                ["On each site's own test rows, mean over seeds."],
                [Rows(level_head(figures), level_rows(figures), last_is_total=True)],
                [levels],
            ),
            Part(
                "Over all test rows",
                ["What joining gains over each baseline; each site alone answers for its own rows."],
                [Rows(gain_head(figures, "over"), overall_rows(figures), text_columns=text)],
            ),
            Part("How to read it", figures["notes"]),
            Part("What is guaranteed", [f"{figures['titles'][n]}: {said}" for n, said in figures["privacy"].items()]),
            Part("Config", listing=config_listing(figures["config"])),
        ],
    )
