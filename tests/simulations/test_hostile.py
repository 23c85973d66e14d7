"""Every attack against every method: the run goes on, and each round's record says what became of the hostile site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.config.simulation import AttackName
from common.methods import METHODS
from common.run_folder import RunFolder
from common.tensors import is_finite
from simulations.results.hostile import ATTACKS, HOSTILE, SITES, WELL_FORMED, Cell, cells, config_of, shown
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
    assert [shown(0.80, 0.80), shown(0.761, 0.80), shown(0.759, 0.80)] == ["80.0", "76.1", "75.9*"]
    assert [shown(None), shown("ended", 0.8)] == ["-", "ended"]
