"""Every attack in a run: the run goes on, and admission says why, or what it does not see yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.config.simulation import AttackName
from common.errors import ConfigError, RunError
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from simulations.engines.settings import EngineSettings
from simulations.faults.attacks import ATTACKS, DESCRIPTION_ATTACKS
from simulations.run import simulate
from tests.conftest import config_text

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


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run with a simulation section; return each round's sites, the trained tensors and the start record.

    The same run is done once.
    """
    base = tmp_path_factory.mktemp("attacks")
    done: dict[str, Any] = {}

    def run_it(simulation: dict[str, Any], rounds: int = 1, **sections: Any) -> Any:
        sections |= {"federation": {"rounds": rounds}, "simulation": simulation, "evaluation": {"enabled": False}}
        key = json.dumps(sections)
        if key not in done:
            folder = base / str(len(done))
            config = parse_run_config(config_text(base, tiny_models["bert"], **sections), "test", None)
            # One by one: who is trained together may change the last bits of a run without one of them.
            assert simulate(config, folder, engine=EngineSettings(cohort=1))["rounds"] == rounds
            records = RunFolder(folder).records()
            sites = [record["sites"] for record in records if record["kind"] == "round"]
            done[key] = sites, load_file(next(folder.glob("checkpoint/*.safetensors"))), records[0]
        return done[key]

    return run_it


def attack_of(name: AttackName, **changes: Any) -> dict[str, Any]:
    return {"attacks": [{"name": name, "sites": [HOSTILE], **changes}]}


ABSENT = {"windows": [{"site": HOSTILE, "from_round": 99}]}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_attack_is_written_and_tested() -> None:
    assert ATTACKS.keys() | DESCRIPTION_ATTACKS.keys() == set(get_args(AttackName))
    assert REJECTED.keys() | {*WELL_FORMED, *OTHERS} == set(get_args(AttackName))


PACKINGS: dict[str, dict[str, Any]] = {
    "fp32": {"codec": "fp32"},
    "bf16": {"codec": "bf16"},
    "int8 in zstd": {"codec": "int8", "zstd": 3},
    "int4": {"codec": "int4", "block": 32},
    "top-k": {"codec": "fp32", "top_k": 0.2},
    "top-k of int4 in zstd": {"codec": "int4", "top_k": 0.5, "zstd": 3},
}


def one_a_round(packing: str) -> dict[str, Any]:
    """All malformed updates in one run, one a round."""
    attacks = [
        {"name": name, "sites": [HOSTILE], "from_round": number, "to_round": number}
        for number, name in enumerate(REJECTED, start=1)
    ]
    return {"simulation": {"attacks": attacks}, "rounds": len(REJECTED), "communication": PACKINGS[packing]}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", REJECTED)
def test_malformed_update_is_rejected_with_its_reason(run: Run, name: AttackName, packing: str) -> None:
    sites = run(**one_a_round(packing))[0][list(REJECTED).index(name)]
    assert sites[HOSTILE]["status"] == "rejected"
    assert sites[HOSTILE]["reason"].startswith(f"{REJECTED[name]}:")
    assert [outcome["status"] for outcome in sites.values()].count("admitted") == 2


def test_rejected_updates_leave_the_bits_of_a_run_without_their_site(run: Run) -> None:
    attacked = one_a_round("fp32")
    assert same(run(**attacked)[1], run(**attacked | {"simulation": ABSENT})[1])


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


def test_duplicate_counts_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sites, adapter, _ = run(attack_of("duplicate"), rounds=2)
    honest_adapter = run({}, rounds=2)[1]
    assert same(adapter, honest_adapter)
    assert [outcomes[HOSTILE]["status"] for outcomes in sites] == ["admitted", "admitted"]
    assert [record.message for record in caplog.records] == ["node 2 answered a message a second time; ignored"] * 2


def test_negative_weight_leaves_its_site_out_and_the_run_goes_on(run: Run) -> None:
    weights = {"aggregation": {"weights": "examples"}}
    sites, adapter, start = run(attack_of("negative_weight"), **weights)
    assert start["sites"] == ["site 0", "site 2"]
    assert list(start["left_out"]) == ["2"]
    assert "num_examples" in start["left_out"]["2"]
    assert HOSTILE not in sites[0]
    assert same(adapter, run(ABSENT, **weights)[1])


def test_run_that_is_left_with_too_few_sites_ends_with_the_reason(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(simulation=attack_of("negative_weight"), federation={"min_sites": 3})
    with pytest.raises(RunError, match=r"2 sites can take part; expected at least 3 .*num_examples"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_huge_weight_rules_a_run_weighted_by_rows_today_and_no_other(run: Run) -> None:
    weights = {"aggregation": {"weights": "examples"}}
    sites, _, _ = run(attack_of("huge_weight"), **weights)
    assert sites[0][HOSTILE]["weight"] == 1.0
    assert sites[0]["site 0"]["weight"] < 1e-6
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
