"""The results script: tables from summaries, and settings that are real configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import simulations.results.__main__ as results
from common.config.load import load_run_config
from simulations.results.lines import GRIDS, Grid

CELLS = Grid("quickstart", {"head only": ("training.lr=0.1",)}, (None, 8.0), {"head only": ("training.lr=0.2",)})


def test_interval_is_students() -> None:
    assert results.interval([1.0]) == "1.0"
    assert results.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"


def test_only_runs_without_a_summary_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path)
    line = CELLS.cell("head only", 8.0)
    folder = results.folder_of(line, 1)
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    missing = results.missing_runs([line], range(3))
    assert [run.seed for run in missing] == [0, 2]
    assert {run.config.evaluation.every for run in missing} == {0}


def test_grid_shows_mean_interval_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path)
    for seed, accuracy in ((0, 0.5), (2, 0.7)):
        folder = results.folder_of(CELLS.cell("head only", 8.0), seed)
        folder.mkdir()
        summary = {"metrics_after": {"test": {"overall": {"accuracy": accuracy}}}}
        (folder / "summary.json").write_text(json.dumps(summary))
    assert results.grid(CELLS).splitlines()[2] == "| head only | - | 60.0 ± 127.1 (2) |"


@pytest.mark.parametrize("line", results.every_line(), ids=lambda line: f"{line.config} {line.label}")
def test_every_line_is_a_config_that_loads(line: results.Line) -> None:
    path = results.ROOT / "configs" / f"{line.config}.yaml"
    config = load_run_config(path, ["seed=1", "evaluation.every=0", *line.overrides])
    assert (config.privacy.unit == "none") == line.label.endswith("no DP")


def test_lines_have_folders_of_their_own() -> None:
    folders = [results.folder_of(line, 0) for line in results.every_line()]
    assert len(set(folders)) == len(folders)
    assert all(set(cells.methods) == set(cells.plain) for cells in GRIDS.values())
