"""The grid of methods: its configs, its tables, and runs that share what frozen blocks make of the rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import client.training.features
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from simulations.results import hostile, methods
from simulations.results.method_grid import (
    FEDERATIONS,
    PRIVACIES,
    RATED_FEDERATIONS,
    RATED_METHODS,
    RATES,
    ROOT,
    SIZES,
    Cell,
    cells,
    rated_cells,
)
from simulations.results.method_tables import Findings, read_findings, tables
from simulations.results.methods import COMMAND, PAGE
from simulations.results.page import write_tables
from simulations.study.curves import Point
from simulations.study.runs import PlannedRun, run_missing

FIRST = next(iter(FEDERATIONS))


@pytest.mark.parametrize("size", SIZES)
def test_every_cell_is_a_config_of_its_method_and_privacy(size: str, tmp_path: Path) -> None:
    found = cells(size)
    rated = [cell for cell in found if cell.rate != 1]
    assert len(found) - len(rated) == len(FEDERATIONS) * len(PRIVACIES) * len(METHODS)
    folders = set()
    for cell in found:
        run = cell.run(1, tmp_path)
        folders.add(run.folder)
        assert run.config.aggregation.method == cell.method
        assert (run.config.privacy.unit == "none") == (cell.privacy == "no DP")
        assert run.config.adapter.rank == 4
    assert len(folders) == len(found)


def test_rates_are_those_of_the_grid_times_a_factor_but_for_the_head() -> None:
    rated = rated_cells("capped")
    assert len(rated) == len(RATED_METHODS) * len(RATED_FEDERATIONS) * len(RATES)
    assert set(rated) <= set(cells("capped"))
    for cell in rated:
        own, grid = (each.config(0).training for each in (cell, replace(cell, rate=1.0)))
        assert own.lr == pytest.approx(cell.rate * grid.lr, rel=1e-5)
        assert own.model_copy(update={"lr": grid.lr}) == grid


def test_federations_of_one_data_set_share_their_rows_between_methods(tmp_path: Path) -> None:
    for federation in FEDERATIONS:
        own = [cell.config(2) for cell in cells("capped") if cell.federation == federation]
        assert len({config.data for config in own}) == 1


def point(number: int, accuracy: float, megabytes: float) -> Point:
    return Point(number, accuracy, None, 1.0, megabytes, None, None)


def findings() -> Findings:
    def course(last: float) -> list[Point]:
        return [point(0, 0.1, 0.0), point(1, last / 2, 1.0), point(2, last, 2.0)]

    accuracies = {"fedit": (0.5, 0.4), "rolora": (0.6, 0.6), "fedsa_lora": (0.9, 0.9)}
    slower = Cell("capped", RATED_FEDERATIONS[-1], "ε = 6", "fedsvd", RATES[0])
    return Findings(
        "capped",
        {
            Cell("capped", FIRST, "no DP", method): {seed: course(value) for seed, value in enumerate(values)}
            for method, values in accuracies.items()
        }
        | {slower: {0: course(0.6), 1: course(0.62)}},
    )


def test_tables_show_means_targets_bytes_and_pairs() -> None:
    written = tables(findings())
    row = {line.split(" | ")[0].removeprefix("| "): line for line in written["capped-accuracy-plain"].splitlines()}
    assert row["`fedit`"].startswith("| `fedit` | 45.0 ± 63.5 (2) | - |")
    assert "`fedsa_lora` (personal)" in row
    assert findings().target(FIRST, "no DP") == pytest.approx(54.0)  # nine tenths of RoLoRA's, not of FedSA's
    reached = {line.split(" | ")[0].removeprefix("| "): line for line in written["capped-bytes-plain"].splitlines()}
    assert f"{FIRST}, to 54.0 %" in written["capped-bytes-plain"]
    assert "| 2.00 (2 of 2) |" in reached["`rolora`"]
    assert "not reached (0 of 2)" in reached["`fedit`"]
    assert "| `rolora` - `fedit`, no DP | +15.0 [-48.5, +78.5] (2) |" in written["capped-pairs"]
    rates = written["capped-rates"].splitlines()
    assert len(rates) == 2 + len(RATES)
    assert rates[2] == "| rate x 0.33 | - | - | - | 61.0 ± 12.7 (2) |"
    assert [name for name, method in METHODS.items() if method.personal] == ["fedsa_lora"]


def test_page_has_the_markers_and_keeps_tables_of_more_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, written = Path(shutil.copy(PAGE, tmp_path)), tables(findings())
    before = copy.read_text(encoding="utf-8")
    write_tables(copy, written, COMMAND)
    assert copy.read_text(encoding="utf-8") == before
    assert capsys.readouterr().err.count("is left as it is") == 1
    for name in written:
        begin, end = f"<!-- {name}: written by {COMMAND} -->", f"<!-- end of {name} -->"
        head, _, rest = copy.read_text(encoding="utf-8").partition(begin)
        copy.write_text(f"{head}{begin}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    write_tables(copy, written, COMMAND)
    assert "| `rolora` - `fedit`, no DP | +15.0" in copy.read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="lacks the markers of table 'other'"):
        write_tables(copy, {"other": ""}, COMMAND)


def test_runs_of_other_configs_are_not_shown(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    cell = Cell("capped", FIRST, "no DP", "fedit")
    run_missing([PlannedRun("other", make_config(), cell.run(0, tmp_path).folder)])
    with pytest.raises(ConfigError, match="run of another config"):
        read_findings("capped", [cell], range(1), tmp_path)
    assert read_findings("capped", [cell], range(1), tmp_path / "nothing").curves == {}


def test_runs_on_the_same_rows_share_what_frozen_blocks_make_of_them(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = {"target_modules": ["layer.1.attention.self.query"]}
    made = 0
    compute = client.training.features.frozen_states

    def counted(*arguments: object, **options: object) -> object:
        nonlocal made
        made += 1
        return compute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client.training.features, "frozen_states", counted)

    def planned(folder: str) -> list[PlannedRun]:
        methods = ("fedit", "ffa_lora")
        return [
            PlannedRun(method, make_config(adapter=upper, aggregation={"method": method}), tmp_path / folder / method)
            for method in methods
        ]

    run_missing(planned("alone"))
    assert made == 6
    run_missing(planned("shared"), keep=True)
    assert made == 9
    for method in ("fedit", "ffa_lora"):
        alone, shared = (
            load_file(tmp_path / folder / method / "adapter" / "adapter_model.safetensors")
            for folder in ("alone", "shared")
        )
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.parametrize("script", ["methods", "hostile"])
def test_part_that_no_label_contains_is_refused(script: str) -> None:
    command = [sys.executable, "-m", f"simulations.results.{script}", "--only", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only 'nothing'" in done.stderr


def test_examples_of_labels_are_labels() -> None:
    assert any(cell.label == methods.EXAMPLE for cell in cells("capped"))
    assert any(cell.label == hostile.EXAMPLE for cell in hostile.cells(METHODS))
