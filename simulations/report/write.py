"""Which report a folder gets, and where it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import simulations.baselines.baselines as baselines
import simulations.compare.compare as comparison
import simulations.sweep.files as sweep
from common.atomic import write_atomic
from common.errors import ConfigError
from simulations.report.of_baselines import baselines_page
from simulations.report.of_comparison import comparison_page
from simulations.report.of_run import run_page
from simulations.report.of_sweep import sweep_page
from simulations.report.page import Page, render

PAGES: dict[str, Callable[[Path], Page]] = {
    "summary.json": run_page,
    comparison.FILE: comparison_page,
    baselines.FILE: baselines_page,
    sweep.RESULT: sweep_page,
}
"""The page of a folder, by the file that tells what it is of."""

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, a comparison, a sweep or baselines, and return its path.

    Raises:
        ConfigError: if the folder is none of these, or not complete.
    """
    for name, page_of in PAGES.items():
        if (folder / name).is_file():
            path = folder / REPORT
            write_atomic(path, render(page_of(folder)).encode())
            return path
    raise ConfigError(
        f"{folder} holds none of {', '.join(PAGES)}; expected the folder of a complete run, comparison, sweep or "
        "baselines. Complete it first."
    )
