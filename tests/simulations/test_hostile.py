"""Every attack against every method: the run goes on, and each round's record says what became of the hostile site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.config.simulation import AttackName
from common.methods import METHODS
from common.run_folder import RunFolder
from common.tensors import is_finite
from simulations.results.hostile import (
    ATTACKS,
    HOSTILE,
    LARGEST_MOVE,
    MALFORMED,
    ROOT,
    SITES,
    WELL_FORMED,
    WORK,
    Cell,
    cells,
    config_of,
    malformed_table,
    moved_by,
    planned,
    shown,
    well_formed_table,
)
from simulations.run import simulate
from tests.simulations.faults.test_attacks import REJECTED
from tests.simulations.test_run import adapter_of

ONE, DECLARES_LESS, DECLARES_MORE = "site-1", "site-2", "site-3"
BY_ROUND: tuple[AttackName, ...] = tuple(name for name in ATTACKS if not name.endswith("_weight"))
EXPECTED: dict[AttackName, tuple[str, str]] = {
    **{name: ("rejected", f"{reason}:") for name, reason in REJECTED.items()},
    "huge_norm": ("rejected", "norm:"), "scale_1000": ("rejected", "norm:"), "replay": ("rejected", "round:"),
    "duplicate": ("admitted", ""), "denormal_flood": ("admitted", ""), "sign_flip": ("admitted", ""),
}  # fmt: skip


def every_attack(make_config: Callable[..., RunConfig], method: str) -> RunConfig:
    """One hostile site that tries one attack a round, one that declares less than no rows, one that declares most."""
    attacks: list[dict[str, Any]] = [
        {"name": name, "sites": [ONE], "from_round": number, "to_round": number}
        for number, name in enumerate(BY_ROUND, start=1)
    ]
    attacks += [
        {"name": "negative_weight", "sites": [DECLARES_LESS]},
        {"name": "huge_weight", "sites": [DECLARES_MORE]},
    ]
    return make_config(
        aggregation={"method": method, "weights": "examples", "max_weight": 0.4, "norm_bound_of_median": 5.0},
        federation={"rounds": len(BY_ROUND)}, simulation={"attacks": attacks},
        evaluation={"enabled": False}, data={"partition": {"kind": "iid", "sites": 7}},
    )  # fmt: skip


def play(make_config: Callable[..., RunConfig], folder: Path, method: str) -> None:
    summary = simulate(every_attack(make_config, method), folder)
    assert summary["rounds"] == len(BY_ROUND)
    start, *rounds = (record for record in RunFolder(folder).records() if record["kind"] in ("start", "round"))
    assert DECLARES_LESS not in start["sites"]
    for attack, record in zip(BY_ROUND, rounds, strict=True):
        status, reason = EXPECTED[attack]
        outcome = record["sites"][ONE]
        assert outcome["status"] == status, (method, attack, outcome)
        assert (outcome["reason"] or "").startswith(reason), (method, attack, outcome)
        weights = {site: one["weight"] for site, one in record["sites"].items() if one["status"] == "admitted"}
        assert len(weights) >= len(record["sites"]) - 1
        others = [weight for site, weight in weights.items() if site != DECLARES_MORE]
        assert weights[DECLARES_MORE] <= 0.4 * (sum(weights.values()) + max(others))
    assert is_finite(adapter_of(folder))


@pytest.mark.parametrize("method", ["fedit"])
def test_run_goes_on_through_every_attack(make_config: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    play(make_config, tmp_path / "run", method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "fedit"])
def test_every_method_goes_on_through_every_attack(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    play(make_config, tmp_path / "run", method)


@pytest.mark.slow
def test_matching_rule_keeps_what_honest_sites_reach(tmp_path: Path) -> None:
    fewer = ("data.max_rows_per_site=24", "data.max_test_rows=200")

    def accuracy(cell: Cell) -> float:
        config = load_run_config(ROOT / "configs" / "quickstart.yaml", [*WORK, *fewer, *cell.overrides()])
        summary = simulate(config, tmp_path / cell.label.replace(" ", "-"))
        return float(summary["metrics_after"]["test"]["overall"]["accuracy"])

    honest, guarded, plain = (
        accuracy(cell)
        for cell in (
            Cell("fedit", None, "plain"),
            Cell("fedit", "scale_1000", "guarded"),
            Cell("fedit", "scale_1000", "plain"),
        )
    )
    assert guarded >= (1 - LARGEST_MOVE) * honest
    assert plain < 0.5 * honest


def test_grid_has_every_attack_under_every_method_and_its_rule_where_there_is_one() -> None:
    found = cells(METHODS)
    assert len(found) == len(set(found)) == len(METHODS) * (2 + len(ATTACKS) + len(WELL_FORMED))
    assert len(ATTACKS) == 18  # seventeen, with a declared weight that is negative or huge
    for cell in (Cell(method, "sign_flip", "guarded") for method in METHODS):
        settings = config_of(cell).aggregation
        assert (settings.robust, settings.robust_sites) == ("multi_krum", HOSTILE)
    weighted = config_of(Cell("fedit", "huge_weight", "guarded", "examples"))
    assert weighted.aggregation.max_weight == pytest.approx(1.2 / SITES)


def test_marks_what_moved_by_more_than_a_twentieth() -> None:
    honest = [0.80, 0.70, 0.90]
    assert [shown(honest, honest), shown([0.761, 0.661, 0.861], honest)] == ["80.0", "76.1"]
    assert shown([0.759, 0.659, 0.859], honest) == "75.9*"
    assert shown([0.77], honest) == "77.0"  # beside the honest run of its own seed
    assert shown([0.75], honest) == "75.0*"
    assert [shown([0.8, None, 0.8], honest), shown([0.8, None, "ended"], honest)] == ["-", "ended"]


def test_difference_is_paired_by_seed() -> None:
    assert moved_by([0.79, 0.69, 0.89], [0.80, 0.70, 0.90]) == "-1.0 [-1.0, -1.0]"
    assert moved_by([0.79, None, 0.89], [0.80, 0.70, 0.90]) == "-"
    assert moved_by([0.7, 0.6, 0.5], [0.8, "ended", 0.6]) == "-"


def test_refused_attacks_are_run_once_and_the_others_with_every_seed(tmp_path: Path) -> None:
    numbers = {cell: [run.seed for run in planned(cell, tmp_path)] for cell in cells(["fedit"])}
    assert {cell.attack for cell, seeds in numbers.items() if seeds == [0]} == set(MALFORMED)
    assert {cell.attack for cell, seeds in numbers.items() if seeds == [0, 1, 2]} == {None, *WELL_FORMED}


def test_tables_have_a_line_for_every_attack_and_tell_what_is_missing(tmp_path: Path) -> None:
    cell = Cell("fedit", "sign_flip", "guarded")
    for run, accuracy in zip(planned(cell, tmp_path), (0.5, 0.6, 0.7), strict=True):
        run.folder.mkdir(parents=True)
        summary = {"metrics_after": {"test": {"overall": {"accuracy": accuracy}}}}
        (run.folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = well_formed_table(["fedit", "fedsvd"], tmp_path).splitlines()
    assert len(lines) == 2 + 2 * len(WELL_FORMED)
    assert [line for line in lines if "60.0" in line] == ["| `sign_flip` | fedit | - | **60.0** | - | - |"]
    refused = malformed_table(["fedit"], tmp_path).splitlines()
    assert [line.split("`")[1] for line in refused[3:]] == list(MALFORMED)
