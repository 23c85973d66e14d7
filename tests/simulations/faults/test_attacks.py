"""Every attack in a run: the run goes on, and admission says why, or what it does not see yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.config.simulation import AttackName
from common.errors import ConfigError
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from simulations.faults.attacks import ATTACKS, DESCRIPTION_ATTACKS
from simulations.run import simulate

HOSTILE = "site 1"
REJECTED: dict[AttackName, str] = {
    "extra_key": "keys", "missing_key": "keys", "renamed_key": "keys", "wrong_shape": "shape",
    "broadcastable_shape": "shape", "wrong_dtype": "dtype", "nan": "non_finite", "infinity": "non_finite",
    "huge_norm": "range", "wrong_base": "base", "oversized": "oversized",
}  # fmt: skip
WELL_FORMED: tuple[AttackName, ...] = ("denormal_flood", "sign_flip", "scale_1000", "gaussian_noise")
"""Admitted today: nothing about their form is wrong. Robust aggregation is what meets them."""
OTHERS: tuple[AttackName, ...] = ("replay", "duplicate", "negative_weight", "huge_weight")

Outcomes = dict[str, dict[str, Any]]
Run = Callable[..., tuple[list[Outcomes], dict[str, torch.Tensor], dict[str, Any]]]


@pytest.fixture
def run(make_config: Callable[..., RunConfig], tmp_path: Path) -> Run:
    """Run with a simulation section; return each round's sites, the trained tensors and the start record."""
    count = 0

    def run_it(simulation: dict[str, Any], rounds: int = 1, **sections: Any) -> Any:
        nonlocal count
        count += 1
        config = make_config(federation={"rounds": rounds}, simulation=simulation, **sections)
        folder = tmp_path / f"run {count}"
        summary = simulate(config, folder)
        assert summary["rounds"] == rounds
        records = RunFolder(folder).records()
        sites = [record["sites"] for record in records if record["kind"] == "round"]
        return sites, load_file(next(folder.glob("checkpoint/*.safetensors"))), records[0]

    return run_it


def attack_of(name: AttackName, **changes: Any) -> dict[str, Any]:
    return {"attacks": [{"name": name, "sites": [HOSTILE], **changes}]}


ABSENT = {"windows": [{"site": HOSTILE, "from_round": 99}]}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_attack_is_written_and_tested() -> None:
    assert ATTACKS.keys() | DESCRIPTION_ATTACKS.keys() == set(get_args(AttackName))
    assert REJECTED.keys() | {*WELL_FORMED, *OTHERS} == set(get_args(AttackName))


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("name", REJECTED)
def test_malformed_update_is_rejected_with_its_reason_as_if_the_site_were_absent(
    run: Run, name: AttackName, codec: str
) -> None:
    communication = {"codec": codec}
    sites, adapter, _ = run(attack_of(name), communication=communication)
    assert sites[0][HOSTILE]["status"] == "rejected"
    assert sites[0][HOSTILE]["reason"].startswith(f"{REJECTED[name]}:")
    assert [outcome["status"] for outcome in sites[0].values()].count("admitted") == 2
    assert same(adapter, run(ABSENT, communication=communication)[1])


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_attack_is_admitted_today_and_the_run_goes_on(run: Run, name: AttackName) -> None:
    honest, honest_adapter, _ = run({}, rounds=2)
    sites, adapter, _ = run(attack_of(name), rounds=2)
    assert sites[0][HOSTILE]["status"] == "admitted"
    assert not same(adapter, honest_adapter)
    norm = honest[0][HOSTILE]["update_norm"]
    factor = {"denormal_flood": 0.0, "scale_1000": 1000.0}.get(name, 1.0)
    assert sites[0][HOSTILE]["update_norm"] == pytest.approx(factor * norm, rel=1e-4, abs=1e-30)
    assert sites[0]["site 0"]["update_norm"] == honest[0]["site 0"]["update_norm"]


def test_sign_flip_sends_the_opposite_of_the_honest_update(run: Run, make_config: Callable[..., RunConfig]) -> None:
    """With the other sites gone, one update is the whole step: there and back are as far from the start."""
    gone = [{"site": site, "from_round": 99} for site in ("site 0", "site 2")]
    forth, back = run({"windows": gone})[1], run({"windows": gone, **attack_of("sign_flip")})[1]
    model = resident_model(make_config())
    start = initial_adapter(model, 0)
    for name, value in forth.items():
        torch.testing.assert_close(start[name] - back[name], value - start[name], rtol=0, atol=1e-6)
    assert not same(forth, back)


def test_replay_is_rejected_from_the_second_round_on(run: Run) -> None:
    sites, _, _ = run(attack_of("replay"), rounds=3)
    assert [outcomes[HOSTILE]["status"] for outcomes in sites] == ["admitted", "rejected", "rejected"]
    assert sites[2][HOSTILE]["reason"].startswith("round:")


def test_duplicate_counts_once(run: Run) -> None:
    sites, adapter, _ = run(attack_of("duplicate"), rounds=2)
    honest, honest_adapter, _ = run({}, rounds=2)
    assert same(adapter, honest_adapter)
    assert [outcomes[HOSTILE]["status"] for outcomes in sites] == ["admitted", "admitted"]


def test_negative_weight_leaves_its_site_out_and_the_run_goes_on(run: Run) -> None:
    weights = {"aggregation": {"weights": "examples"}}
    sites, adapter, start = run(attack_of("negative_weight"), **weights)
    assert start["sites"] == ["site 0", "site 2"]
    assert list(start["left_out"]) == ["2"]
    assert "num_examples" in start["left_out"]["2"]
    assert HOSTILE not in sites[0]
    assert same(adapter, run(ABSENT, **weights)[1])


def test_huge_weight_rules_a_run_weighted_by_rows_today_and_no_other(run: Run) -> None:
    weights = {"aggregation": {"weights": "examples"}}
    sites, _, _ = run(attack_of("huge_weight"), **weights)
    assert sites[0][HOSTILE]["weight"] == 1.0
    assert sites[0]["site 0"]["weight"] < 1e-10
    assert same(run(attack_of("huge_weight"))[1], run({})[1])
    with pytest.raises(ConfigError, match="nobody declares under DP"):
        run(attack_of("huge_weight"), privacy={"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"})


def test_attack_lasts_from_its_first_round_to_its_last(run: Run) -> None:
    sites, _, _ = run(attack_of("nan", from_round=2, to_round=3), rounds=4)
    statuses = [outcomes[HOSTILE]["status"] for outcomes in sites]
    assert statuses == ["admitted", "rejected", "rejected", "admitted"]


def test_attacks_of_one_site_apply_in_their_order(run: Run) -> None:
    attacks = [{"name": name, "sites": [HOSTILE]} for name in ("scale_1000", "sign_flip", "wrong_base")]
    sites, _, _ = run({"attacks": attacks})
    assert sites[0][HOSTILE]["reason"].startswith("base:")
    sites, _, _ = run({"attacks": attacks[:2]})
    alone, _, _ = run({"attacks": attacks[:1]})
    assert sites[0][HOSTILE]["update_norm"] == alone[0][HOSTILE]["update_norm"]
