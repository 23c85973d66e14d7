"""Sites trained together get what each gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import simulations.cohort.layers
from client.training.site_round import LocalResult
from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.data.batches import Limit
from common.errors import PrivacyError, RunError
from common.methods import trained_names
from common.models.resident import resident_model
from simulations.cohort.layers import Places, Share, divided_layers, divisible_layers, multiply_by_site
from simulations.cohort.training import can_train_together, joint_limit, most_sites, train_together
from tests.conftest import config_text
from tests.simulations.cohort.sites import assignments, distance, one_by_one

MakeConfig = Callable[..., RunConfig]

SIZES = (1, 7, 12, 4, 3)
"""Rows of five sites: with batches of 4, one to three steps, of one to four rows."""

UPDATE_ERROR = 1e-5
"""Largest accepted share of an update's norm; AdamW gets ten times as much, as it divides by small gradients."""

ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine"}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "head_lr": 0.05}
NOISY = {"noise_multiplier": 1.0, "accountant": "rdp", "delta": 1e-3}

MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "mean pooling": {"model": {"pooling": "mean"}},
    "head of two layers": {"family": "roberta"},
    "distilbert": {"family": "distilbert", "aggregation": {"method": "ffa_lora"}},
    "decoder as classifier": {"family": "qwen2"},
    "causal LM, all linear": {"family": "llama", "task": "causal_lm", "adapter": {"target_modules": "all-linear"}},
    "upper layer": {"family": "qwen2", "adapter": {"target_modules": ["layers.1.self_attn.q_proj"]}},
    "gpt2": {"family": "gpt2", "task": "causal_lm"},
}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "flat": {"unit": "example", **NOISY, "sample_rate": 0.2},
    "per layer": {"unit": "example", **NOISY, "clipping": "per_layer", "release_loss": True},
    "adaptive": {"unit": "example", **NOISY, "clipping": "adaptive", "release_loss": True},
    "user": {"unit": "user", **NOISY, "sample_rate": 0.5},
}


def config_of(make_config: MakeConfig, training: dict[str, Any], **sections: Any) -> RunConfig:
    if sections.get("privacy", {}).get("unit") == "user":
        sections["data"] = {"person_field": "site"}
    return make_config(**sections, training={"batch_size": 4, **training})


def expect_as_alone(config: RunConfig, sizes: tuple[int, ...] = SIZES, accepted: float = UPDATE_ERROR) -> None:
    model = resident_model(config)
    assigned = assignments(config, model, sizes)
    assert can_train_together(model, config, assigned[0].names)
    alone = one_by_one(model, config, assigned)
    together = train_together(model, config, assigned)
    for found, expected in zip(together, alone, strict=True):
        assert distance(found, expected) < accepted
        assert isinstance(found, LocalResult)
        assert found.steps == expected.steps
        for ours, theirs in ((found.train_loss, expected.train_loss), (found.clip_norm, expected.clip_norm)):
            assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-4))


@pytest.mark.parametrize("privacy", ["none", "flat"])
@pytest.mark.parametrize("kind", MODELS)
def test_update_is_the_same_as_alone_for_every_kind_of_model(make_config: MakeConfig, kind: str, privacy: str) -> None:
    expect_as_alone(config_of(make_config, SGD, **MODELS[kind], privacy=PRIVACY[privacy]))


@pytest.mark.parametrize("privacy", PRIVACY)
def test_update_is_the_same_as_alone_under_every_mechanism_with_adamw(make_config: MakeConfig, privacy: str) -> None:
    config = config_of(make_config, ADAMW, privacy=PRIVACY[privacy])
    expect_as_alone(config, accepted=10 * UPDATE_ERROR)


@pytest.mark.parametrize("privacy", ["none", "per layer", "user"])
def test_rows_of_a_site_may_fall_into_several_passes(make_config: MakeConfig, privacy: str) -> None:
    training = SGD | {"micro_batch_size": 3, "max_grad_norm": None if privacy != "none" else 0.05}
    expect_as_alone(config_of(make_config, training, privacy=PRIVACY[privacy]))


@pytest.mark.parametrize("privacy", ["none", "flat"])
def test_one_batched_product_gives_what_the_loop_over_sites_gives(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, privacy: str
) -> None:
    batched = partial(multiply_by_site, batched=True)
    monkeypatch.setattr(simulations.cohort.layers, "multiply_by_site", batched)
    expect_as_alone(config_of(make_config, SGD, family="llama", privacy=PRIVACY[privacy]))


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 4))
def test_product_by_site_is_each_sites_own(rows: list[list[int]], width: int) -> None:
    shares = [Share(number, len(own)) for number, own in enumerate(rows)]
    places = Places([length for own in rows for length in own], shares, torch.device("cpu"))
    x = torch.randn(sum(map(sum, rows)), 3, dtype=torch.float64)
    matrices = [torch.randn(3, width, dtype=torch.float64) for _ in rows]
    expected = torch.cat([own @ m for own, m in zip(x.split([*map(sum, rows)]), matrices, strict=True)])
    for batched in (False, True):
        torch.testing.assert_close(multiply_by_site(x, matrices, places, batched=batched), expected)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("ragged")

    def make(**sections: Any) -> RunConfig:
        return parse_run_config(config_text(folder, tiny_models["bert"], **sections), "test", None)

    return make


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch_size=st.integers(1, 5),
    epochs=st.sampled_from([0.5, 1.0, 1.7]),
    private=st.booleans(),
)
def test_any_cohort_is_trained_as_its_sites_alone(
    ragged: Callable[..., RunConfig], sizes: list[int], batch_size: int, epochs: float, private: bool
) -> None:
    privacy = PRIVACY["adaptive"] if private else PRIVACY["none"]
    training = SGD | {"batch_size": batch_size, "local_epochs": epochs}
    expect_as_alone(ragged(privacy=privacy, training=training), tuple(sizes))


def test_site_that_diverges_fails_alone(make_config: MakeConfig) -> None:
    config = config_of(make_config, SGD)
    model = resident_model(config)
    assigned = assignments(config, model, SIZES)
    broken = {n: v * torch.nan if "classifier" in n else v for n, v in assigned[1].adapter.items()}
    found = train_together(model, config, [assigned[0], replace(assigned[1], adapter=broken), *assigned[2:]])
    assert isinstance(found[1], RunError)
    alone = one_by_one(model, config, assigned)
    assert all(distance(found[k], alone[k]) < UPDATE_ERROR for k in (0, 2, 3, 4))


@pytest.mark.parametrize("micro_batch_size", ["auto", 2])
def test_site_whose_gradients_cannot_be_attributed_fails_alone(
    make_config: MakeConfig, micro_batch_size: int | str
) -> None:
    training = SGD | {"micro_batch_size": micro_batch_size}
    config = config_of(make_config, training, privacy=PRIVACY["user"] | {"sample_rate": 1.0})
    model = resident_model(config)
    assigned = assignments(config, model, SIZES)
    site = assigned[2].site
    site.num_units("user")  # known before its persons are lost
    object.__setattr__(site, "persons", None)
    found = train_together(model, config, assigned)
    assert isinstance(found[2], PrivacyError)
    intact = [assigned[k] for k in (0, 1, 3, 4)]
    alone = one_by_one(model, config, intact)
    assert all(distance(found[k], one) < UPDATE_ERROR for k, one in zip((0, 1, 3, 4), alone, strict=True))


def test_joint_training_leaves_the_model_as_it_was(make_config: MakeConfig) -> None:
    config = config_of(make_config, SGD, privacy=PRIVACY["flat"])
    model = resident_model(config)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    train_together(model, config, assignments(config, model, SIZES))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert not any("forward" in layer.__dict__ for layer in model.module.modules())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in model.module.parameters())


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"kind": "prompt", "virtual_tokens": 2}},
        {"adapter": {"kind": "head_only"}},
        {"family": "xlnet"},
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=lambda sections: str(sections),
)
def test_what_cannot_be_divided_among_sites_is_not_joined(make_config: MakeConfig, sections: dict[str, Any]) -> None:
    config = make_config(**sections)
    model = resident_model(config)
    assert not can_train_together(model, config, trained_names(config, model.parameters))


def test_layers_are_not_divided_twice(make_config: MakeConfig) -> None:
    config = make_config()
    model = resident_model(config)
    layers = divisible_layers(model, frozenset(model.parameters)) or {}
    with (
        divided_layers(model, layers, [], private=False),
        pytest.raises(RunError, match="replaced already"),
        divided_layers(model, layers, [], private=False),
    ):
        pass


def test_memory_of_a_pass_is_bounded(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, private = make_config(), make_config(privacy=PRIVACY["flat"])
    model = resident_model(plain)
    names = trained_names(plain, model.parameters)
    assert joint_limit(plain, model, names) == Limit(tokens=1024)
    row_bytes = 4 * sum(model.parameters[name].numel() for name in names)
    assert joint_limit(private, model, names) == Limit(rows=2**26 // row_bytes, tokens=1024)
    assert most_sites(model, names) == 2**30 // (6 * row_bytes)
    monkeypatch.setitem(simulations.cohort.training.SITES_BYTES, "cpu", 1)
    assert most_sites(model, names) == 1
