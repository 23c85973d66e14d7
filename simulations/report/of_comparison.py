"""The report of a comparison."""

from __future__ import annotations

from pathlib import Path

from simulations.compare.compare import load_comparison
from simulations.compare.pictures import comparison_pictures
from simulations.compare.tables import COLUMNS, difference_rows, variant_rows
from simulations.report.listing import config_listing
from simulations.report.page import Page, Part, Rows
from simulations.study.shown import shown_metric


def comparison_page(folder: Path) -> Page:
    """Return the report of the comparison in ``folder``.

    Raises:
        ConfigError: if it cannot be read.
    """
    comparison = load_comparison(folder)
    figures = comparison.figures
    label, factor = shown_metric(figures["headline"])
    curves, ends = comparison_pictures(comparison)
    seeds = len(figures["seeds"])
    rows = variant_rows(figures)
    best = (max if figures["higher_is_better"] else min)(
        figures["variants"], key=lambda name: figures["variants"][name]["estimates"]["after"]["value"]
    )
    differences = [
        (second, first, shown, decided) for first, second, shown, decided in difference_rows(figures, factor)
    ]
    after = Part(
        "After the run",
        [
            "Mean over seeds ± half the width of the 95 % t-interval. MB are up and down, all sites; ε is the largest "
            "at any site; worst site is the site where the adapter does worst."
        ],
        [Rows(["variant", *COLUMNS], [[name, *cells] for name, cells in rows])],
        [ends],
    )
    paired = Part(
        "Differences, paired by seed",
        [
            "Two variants with the same seed share start, data order and sites, so their difference is taken seed by "
            "seed. “no” means that the interval holds 0. With many pairs some exclude 0 by chance.",
            "Where a variant was chosen by what it does on these test rows, its figure here is too good: choose on "
            "other rows, as fedtune-sim sweep does.",
        ],
        [
            Rows(
                ["variant", "minus", f"difference in {label}", "decided"],
                differences,
                text_columns=frozenset({0, 1, 3}),
            )
        ],
    )
    return Page(
        f"Comparison of {len(rows)} variants" if len(rows) > 1 else f"{rows[0][0]} over seeds",
        f"{label} on the test rows, {seeds} {'seed' if seeds == 1 else 'seeds'} each.",
        [("best mean", best), *((name, cells[1]) for name, cells in rows[:4])],
        [
            Part("On the way", pictures=[curves]),
            after,
            *([paired] if differences else []),
            Part("What is guaranteed", [f"{n}: {f['privacy_claim']}" for n, f in figures["variants"].items()]),
            *(Part(f"Config: {n}", listing=config_listing(f["config"])) for n, f in figures["variants"].items()),
        ],
    )
