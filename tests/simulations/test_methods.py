"""Every aggregation method through the real round loop, wire and site: runs, export, resume, bytes, ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load, load_file

from client.personal import PersonalStore
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ConfigError, RunError
from common.evaluation import Evaluator
from common.factors import A, B, R, is_fixed
from common.methods import METHODS
from common.models.adapter import initial_adapter
from common.models.export import load_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import manifest_of
from server.checkpoint import load_checkpoint
from server.events import Observer
from server.outcome import Outcome
from simulations.check import check_run
from simulations.run import simulate

GLOBAL = sorted(METHODS.keys() - {"fedsa_lora"})
"""Methods with one adapter for all sites."""
EXACT = {"ffa_lora", "rolora", "flora", "fedex_lora", "fedsvd", "fed_sb"}
NORM_OUTWEIGHS = ("hetlora", "geometric_median")
"""Refused: one weighs by norm what the other weighs by distance."""
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


class StopAfter(Observer):
    """Presses Ctrl-C when the first site of a round has answered."""

    def __init__(self, number: int) -> None:
        self.number = number

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        if number == self.number:
            raise KeyboardInterrupt


class Wire:
    """Keeps the names of what passed, by node and direction."""

    def __init__(self) -> None:
        self.down: list[dict[str, torch.Tensor]] = []
        self.up: list[dict[str, torch.Tensor]] = []

    def __call__(self, node: int, received: bytes, sent: bytes) -> None:
        if received and sent:
            self.down.append(load(received))
            self.up.append(load(sent))


def method_config(
    make_config: Callable[..., RunConfig], method: str, family: str = "bert", **sections: Any
) -> RunConfig:
    defaults: dict[str, Any] = {
        "aggregation": {"method": method}, "federation": {"rounds": 3}, "training": {"lr": 0.05},
    }  # fmt: skip
    return make_config(
        family, **{key: defaults.get(key, {}) | sections.get(key, {}) for key in {**defaults, **sections}}
    )


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", GLOBAL)
def test_export_gives_the_logits_of_the_last_round(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str, family: str
) -> None:
    config = method_config(make_config, method, family, adapter={"rank": 2, "alpha": 4})
    summary = simulate(config, tmp_path / "run")
    model = resident_model(config)
    kept = load_checkpoint(RunFolder(tmp_path / "run").checkpoint).adapter
    model.load({**initial_adapter(model, config.seed), **kept})
    model.module.eval()
    ids = torch.tensor([[2, 5, 6, 7, 9], [2, 8, 11, 4, 10]])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model.source, num_labels=3, pad_token_id=0
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    loaded = load_adapter(tmp_path / "run" / "adapter", config.model.source, "cpu")
    with torch.no_grad():
        wanted = model.logits(ids, torch.ones_like(ids))
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded.logits(ids, torch.ones_like(ids)), wanted, rtol=1e-4, atol=1e-5)
        with again.disable_adapter():
            assert float((again(input_ids=ids).logits - wanted).abs().max()) > 1e-3
    assert summary["rounds"] == 3


@pytest.mark.parametrize(
    "privacy", [{"unit": "none"}, pytest.param(PRIVATE, marks=pytest.mark.slow)], ids=["no DP", "DP"]
)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_ends_on_the_same_bits(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str, privacy: dict[str, Any]
) -> None:
    config = method_config(make_config, method, privacy=privacy)
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfter(3))
    resumed = simulate(config, tmp_path / "cut", resume=True)
    first, second = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("metrics_after", "epsilon", "bytes_down", "bytes_up", "products"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize("method", GLOBAL)
def test_exact_method_has_no_aggregation_error_and_others_have(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    summary = simulate(method_config(make_config, method), tmp_path / "run")
    errors = summary["products"]["error"]
    assert len(errors) == 3
    assert all((error < 1e-5) == (method in EXACT) for error in errors)
    assert all(drift > 0 for drift in summary["products"]["drift"])
    lows, means = summary["products"]["cosine_min"], summary["products"]["cosine_mean"]
    assert all(-1 <= low <= mean <= 1 for low, mean in zip(lows, means, strict=True))
    rounds = list(RunFolder(tmp_path / "run").iterate_records("round"))
    norms = [sorted(record["products"]["update_norms"].values()) for record in rounds]
    assert [len(own) for own in norms] == [3, 3, 3]
    assert summary["products"]["update_norm_median"] == [own[1] for own in norms]
    assert summary["products"]["update_norm_max"] == [own[2] for own in norms]


NEVER_UP = {
    "ffa_lora": (A,), "fedsvd": (A,), "fed_sb": (A, B), "fedsa_lora": (B,),
}  # fmt: skip
NEVER_DOWN = {"ffa_lora": (A,), "fed_sb": (A, B), "flora": (A, B), "fedsa_lora": (B,)}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_need_is_never_on_the_wire(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    wire = Wire()
    config = method_config(make_config, method)
    summary = simulate(config, tmp_path / "run", watch=wire)
    assert len(wire.up) == len(wire.down) == 9
    for number, (down, up) in enumerate(zip(wire.down, wire.up, strict=True)):
        odd = number // 3 % 2 == 0
        absent = ((A,) if odd else (B,)) if method == "rolora" else NEVER_UP.get(method, ())
        assert not any(name.endswith(absent) for name in up if absent)
        assert not any(name.endswith(NEVER_DOWN[method]) for name in down if method in NEVER_DOWN)
        assert any(name.endswith(R) for name in up) == (method == "fed_sb")
        assert any(is_fixed(name) for name in down) == (METHODS[method].corrects and number >= 3)
        assert not any(is_fixed(name) for name in up)
    records = [r for r in RunFolder(tmp_path / "run").records() if r["kind"] == "round"]
    for record, down, up in zip(records, wire.down[::3], wire.up[::3], strict=True):
        outcome = record["sites"]["site 0"]
        assert outcome["bytes_down"] > sum(value.nbytes for value in down.values())
        assert outcome["bytes_up"] > sum(value.nbytes for value in up.values())
    planned = check_run(config)["bytes_per_site_and_round"]
    assert 0 < summary["bytes_up"]["site 0"][0] - planned["up"] < 1000


@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.mixed_ranks))
def test_sites_of_mixed_ranks_get_and_send_what_they_can_hold(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    wire = Wire()
    config = method_config(
        make_config, method, adapter={"rank": 4, "alpha": 8}, federation={"rounds": 2, "virtual_ranks": [1, 3, 8]}
    )
    summary = simulate(config, tmp_path / "run", watch=wire)
    for number, (down, up) in enumerate(zip(wire.down, wire.up, strict=True)):
        rank = (1, 3, 4)[number % 3]
        for tensors in (down, up):
            assert {len(value) for name, value in tensors.items() if name.endswith(A)} <= {rank}
            assert {value.shape[1] for name, value in tensors.items() if name.endswith(B)} <= {rank}
        assert any(name.endswith(A) for name in up)
    assert summary["bytes_up"]["site 0"][0] < summary["bytes_up"]["site 1"][0] < summary["bytes_up"]["site 2"][0]
    assert (summary["products"]["error"][0] < 1e-5) == (method == "flora")


MIXED = [name for name, method in METHODS.items() if method.mixed_ranks]


@pytest.mark.parametrize(
    ("method", "rule"),
    [(m, r) for m in MIXED for r in ("krum", "multi_krum", "geometric_median") if (m, r) != NORM_OUTWEIGHS],
)
def test_robust_rule_weighs_sites_of_ranks_of_their_own(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str, rule: str
) -> None:
    hostile = {"name": "scale_1000", "sites": ["site-1"]}

    def play(name: str, **sections: Any) -> dict[str, torch.Tensor]:
        config = method_config(
            make_config, method, adapter={"rank": 4, "alpha": 8}, data={"partition": {"kind": "iid", "sites": 5}},
            federation={"rounds": 3, "virtual_ranks": [4, 1, 2, 1, 1]}, **sections,
        )  # fmt: skip
        simulate(config, tmp_path / name)
        return adapter_of(tmp_path / name)

    guarded = play("guarded", aggregation={"robust": rule}, simulation={"attacks": [hostile]})
    honest = play("honest")
    size = sum(float(value.square().sum()) for value in honest.values()) ** 0.5
    assert sum(float(value.square().sum()) for value in guarded.values()) ** 0.5 < 2 * size
    rows = [value.norm(dim=1) for name, value in guarded.items() if name.endswith(A)]
    assert all(float(own.min()) > 0 for own in rows)  # what no chosen site trained can still be


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_under_example_level_dp(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str, mixed: bool
) -> None:
    if mixed and not METHODS[method].mixed_ranks:
        with pytest.raises(ConfigError, match="needs all sites at one rank"):
            method_config(make_config, method, federation={"virtual_ranks": [1]})
        return
    ranks = {"virtual_ranks": [1, 2]} if mixed else {}
    config = method_config(make_config, method, privacy=PRIVATE, federation={"rounds": 2, **ranks})
    summary = simulate(config, tmp_path / "run")
    assert set(summary["epsilon"]) == set(summary["sites"])
    records = [r for r in RunFolder(tmp_path / "run").records() if r["kind"] == "round"]
    assert all(o["status"] == "admitted" for record in records for o in record["sites"].values())


SITE_LEVEL = {"unit": "site", "noise_multiplier": 1.0, "clip_norm": 0.05, "delta": 1e-2}


@pytest.mark.parametrize("method", METHODS)
def test_site_level_privacy_takes_linear_methods_only_and_withholds_the_measures(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    if not METHODS[method].linear:
        with pytest.raises(ConfigError, match="no sum of updates"):
            method_config(make_config, method, privacy=SITE_LEVEL)
        return
    summary = simulate(method_config(make_config, method, privacy=SITE_LEVEL), tmp_path / "run")
    known = ("error", "drift", "cosine_mean", "cosine_min", "update_norm_median", "update_norm_max")
    assert summary["products"] == {key: [None] * summary["rounds"] for key in known}
    assert "update_norms" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_fedsa_keeps_b_at_each_site_and_evaluates_sites_with_their_own(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = method_config(make_config, "fedsa_lora", "gpt2", training={"lr": 0.02, "local_epochs": 3})
    summary = simulate(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    shapes = {name: shape for name, shape in manifest_of(adapter_of(folder.path)).items() if name.endswith(B)}
    run = load_checkpoint(folder.checkpoint).run
    kept = [PersonalStore.of_virtual_site(folder.sites, f"site {n}").before(run, 4, shapes) for n in range(3)]
    assert all(name.endswith(B) and value.any() for tensors in kept for name, value in tensors.items())
    assert not any(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not any(value.any() for name, value in adapter_of(tmp_path / "run").items() if name.endswith(B))
    assert summary["products"]["error"] == [None] * 3
    assert all(value > 0 for key in ("drift", "update_norm_max") for value in summary["products"][key])
    model = resident_model(config)
    shared = {**initial_adapter(model, 0), **load_checkpoint(RunFolder(tmp_path / "run").checkpoint).adapter}
    alone = Evaluator(model, config, load_federated_data(config.data, config.seed).test)(shared)
    own = summary["metrics_after"]["test"]["by_site"]
    assert all(own[site]["loss"] != metrics["loss"] for site, metrics in alone.by_site.items())


def test_personal_store_gives_what_stood_before_a_round_and_drops_what_came_after(tmp_path: Path) -> None:
    path, run = tmp_path / "sites.db", "c" * 32
    store = PersonalStore.of_virtual_site(path, "a/../b")
    shapes = {"x": (2,)}
    assert store.before(run, 1, shapes) == {}
    for number in (1, 2, 4):
        store.keep(run, number, {"x": torch.full((2,), float(number))})
    assert {number: float(store.before(run, number, shapes)["x"][0]) for number in (3, 4, 5)} == {3: 2, 4: 2, 5: 4}
    store.keep(run, 3, {"x": torch.full((2,), 3.0)})
    assert float(store.before(run, 9, shapes)["x"][0]) == 3
    assert store.before("d" * 32, 9, shapes) == {}
    with pytest.raises(RunError, match="other tensors"):
        store.before(run, 4, {"x": (3,)})
    assert PersonalStore.of_virtual_site(path, "another").before(run, 9, shapes) == {}
