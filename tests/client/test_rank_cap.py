"""What a site holds of a run beyond its largest rank, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import common.models.resident
from client.checks.trial import Trial, trial_run
from client.policy.rules import expect_size
from client.policy.section import Policy
from client.site import real_site
from client.site_config import load_site_config
from client.training.loop import train_locally
from common.config.run import RunConfig
from common.errors import PolicyError
from common.factors import A, B, with_rank
from common.models.adapter import AdaptedModel, adapt, initial_adapter
from common.models.base import load_base
from common.models.resident import loads, resident_model
from common.models.size import adapter_size
from common.privacy.planning import plan_mechanism
from common.randomness import KeyedRandomness
from common.tensors import Tensors, fingerprint
from common.wire import Refusal, SiteDescription, TrainReply
from tests.client.real_sites import RealSite

MakeSite = Callable[..., RealSite]
MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
MIXED = {"aggregation": {"method": "flexlora"}, "adapter": {"rank": 6, "alpha": 5.0, "target_modules": "all-linear"}}


class Ranks:
    """Adapts as ever and sees the largest rank of a factor that any model was made with or loaded."""

    def __init__(self) -> None:
        self.largest = 0

    def adapt(self, *arguments: Any, **more: Any) -> AdaptedModel:
        adapted = adapt(*arguments, **more)
        self.see(adapted.parameters)
        return adapted

    def see(self, parameters: dict[str, Any]) -> None:
        self.largest = max(self.largest, *(len(value) for name, value in parameters.items() if name.endswith(A)))


def test_site_never_holds_more_than_its_largest_rank(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site, seen = make_site(**MIXED), Ranks()
    site.write(max_rank=2)
    start = initial_adapter(site.model, site.config.seed)
    load = AdaptedModel.load

    def seen_load(self: AdaptedModel, adapter: Tensors) -> None:
        seen.see(adapter)
        load(self, adapter)

    monkeypatch.setattr(common.models.resident, "adapt", seen.adapt)
    monkeypatch.setattr(AdaptedModel, "load", seen_load)
    described = site.describe()
    assert isinstance(described, SiteDescription)
    assert described.initial_fingerprint == fingerprint(start)
    assert isinstance(site.train(1, with_rank(start, 2))[0], TrainReply)
    assert seen.largest == 2


def trained(site: RealSite, rank: int | None) -> Tensors:
    """An update of two private steps at rank 2 on a model whose factors were made with ``rank``, noise by a seed."""
    own = load_site_config(site.path)
    model = resident_model(site.config, "cpu", rank)
    held = dataclasses.replace(
        real_site(site.config, own, model), ledger=None, policy=None, personal=None,
        randomness=KeyedRandomness(0, "north"),
    )  # fmt: skip
    start = with_rank(initial_adapter(model, site.config.seed), 2)
    # B is zero at first, and A would have no gradient.
    start = {name: value + 0.01 if name.endswith(B) else value for name, value in start.items()}
    mechanism = plan_mechanism(site.config, held.num_units("example"))
    return train_locally(model, held, site.config, start, frozenset(start), 1, mechanism, None).update


def test_update_is_the_same_to_the_bit_whatever_rank_the_model_was_made_with(make_site: MakeSite) -> None:
    site = make_site(training={"local_steps": 2}, **MIXED)
    expected, found = trained(site, None), trained(site, 2)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert any(value.any() for value in expected.values())


def test_lower_rank_is_the_first_rows_and_has_the_runs_scale(make_config: MakeConfig) -> None:
    config = make_config(**MIXED)
    whole = resident_model(config, "cpu")
    start, scales = with_rank(initial_adapter(whole, 3), 2), scales_of(whole)
    low = resident_model(config, "cpu", 2)
    found = initial_adapter(low, 3)
    assert all(torch.equal(value, found[name]) for name, value in start.items())
    assert fingerprint(initial_adapter(low, 3, 6)) == fingerprint(initial_adapter(whole, 3))
    assert scales_of(low) == scales == {5.0 / 6}


def scales_of(model: AdaptedModel) -> set[float]:
    layers: Any = [layer for layer in model.module.modules() if hasattr(layer, "lora_A")]
    return {layer.scaling["default"] for layer in layers}


@pytest.mark.parametrize(
    ("policy", "max_rank", "method", "code"),
    [
        ({"largest_parameters": 10**6}, None, "flexlora", "policy"),
        ({"largest_parameters": 10**6}, 2, "flexlora", "policy"),
        ({"largest_rank": 256}, None, "flexlora", "policy"),
        ({}, 2, "fedit", "config"),
    ],
)
def test_run_beyond_the_sites_size_is_refused_before_a_model_is_loaded(
    make_site: MakeSite, make_config: MakeConfig, policy: dict[str, Any], max_rank: int | None, method: str, code: str
) -> None:
    site = make_site()
    site.write(policy=policy, max_rank=max_rank)
    adapter = {"rank": 65536, "target_modules": "all-linear"}
    site.config = make_config(
        privacy={"unit": "example", "noise_multiplier": 1.0}, aggregation={"method": method}, adapter=adapter
    )
    before = loads()
    for reply in (site.describe(), site.train(1)[0]):
        assert isinstance(reply, Refusal)
        assert reply.code == code
    assert loads() == before


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet", "gpt2", "llama"])
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank": 3}},
        {"adapter": {"rank": 3, "target_modules": "all-linear"}},
        {"adapter": {"kind": "head_only"}},
        {"adapter": {"rank": 3}, "aggregation": {"method": "fed_sb"}},
    ],
    ids=["auto", "all-linear", "head_only", "core"],
)
def test_size_is_that_of_the_adapter_that_is_made(
    make_config: MakeConfig, family: str, sections: dict[str, Any]
) -> None:
    expect_as_made(make_config(family, **sections))


def test_size_of_a_prompt_of_pooled_features_and_of_a_language_model(make_config: MakeConfig) -> None:
    expect_as_made(make_config("llama", "causal_lm", adapter={"kind": "prompt", "virtual_tokens": 5}))
    expect_as_made(make_config("llama", "causal_lm", adapter={"rank": 3}))
    source = make_config().model.source
    expect_as_made(make_config(model={"source": source, "pooling": "mean"}))
    checkpointing = {"source": source, "gradient_checkpointing": True, "dtype": "bf16"}
    expect_as_made(make_config(model=checkpointing))


def expect_as_made(config: RunConfig) -> None:
    """Check the count against the adapter on a loaded model, and the policy at it and one below."""
    core = config.aggregation.method == "fed_sb"
    made = adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU, core=core)
    count = sum(parameter.numel() for parameter in made.parameters.values())
    assert adapter_size(config) == count
    expect_size(Policy(largest_parameters=count), config)
    with pytest.raises(PolicyError, match=f"{count} numbers"):
        expect_size(Policy(largest_parameters=count - 1), config)


def test_trial_of_a_site_keeps_to_its_largest_rank(make_site: MakeSite) -> None:
    site = make_site()
    site.write(max_rank=2)
    own = load_site_config(site.path)
    config = trial_run(own, 24)
    assert config.adapter.rank == 2
    assert "passed" in Trial(own, config, own=True).self_test()
