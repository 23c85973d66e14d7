"""Blocks below the lowest adapter are run once a row, and training and evaluation end where they end without that."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

import client.training.features
import client.training.loop
import common.evaluation
from client.site import Site, forget_virtual_sites, virtual_site
from client.training.features import site_states
from client.training.loop import train_locally
from common.config.run import RunConfig
from common.data.batches import Collator, Limit
from common.data.federated import load_federated_data
from common.evaluation import Evaluator
from common.methods import trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.frozen import changing_block, frozen_states
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.tensors import Tensors, l2_norm, subtract

UPPER = {
    "bert": ["layer.1.attention.self.query", "layer.1.output.dense"],
    "distilbert": ["layer.1.attention.v_lin"],
    "gpt2": ["h.1.attn.c_attn"],
    "llama": ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"],
}
"""Target modules in the second block of two."""

TOKEN_BYTES = 16 * 4
"""Of a token's state in the tiny models."""

ROWS_OF: dict[str, dict[str, Any]] = {
    "as they are": {},
    "dealt anew": {"partition": {"kind": "iid", "sites": 3}},
}
"""The data section of two deals of the same rows."""


def site_of(config: RunConfig, model: AdaptedModel) -> Site:
    return virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)


def trained(config: RunConfig, *, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> Tensors:
    model = resident_model(config)
    site = site_of(config, model)
    start = initial_adapter(model, config.seed)
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    with monkeypatch.context() as patch:
        if not frozen:
            patch.setattr(client.training.loop, "site_states", lambda *_: None)
        return train_locally(model, site, config, start, trained_names(config, start), 1, mechanism).update


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"unit": "example", "noise_multiplier": 0.5}])
@pytest.mark.parametrize(
    ("family", "task"),
    [*((family, "classification") for family in UPPER), ("gpt2", "causal_lm"), ("llama", "causal_lm")],
)
def test_update_is_that_of_all_blocks(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, family: str, task: str,
    privacy: dict[str, Any],
) -> None:  # fmt: skip
    training = {"optimizer": "sgd", "lr": 0.3, "local_epochs": 2}
    adapter = {"target_modules": UPPER[family]}
    config = make_config(family, task, adapter=adapter, privacy=privacy, training=training)
    model = resident_model(config)
    found = site_states(model, site_of(config, model), config)
    assert found is not None
    assert found.depth == 1
    whole, short = (trained(config, frozen=used, monkeypatch=monkeypatch) for used in (False, True))
    assert l2_norm(subtract(short, whole)) < 1e-5 * l2_norm(whole)


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama"])
def test_head_alone_runs_the_last_block_alone(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    config = make_config(family, adapter={"kind": "head_only"}, training={"optimizer": "sgd", "lr": 0.3})
    whole, short = (trained(config, frozen=used, monkeypatch=monkeypatch) for used in (False, True))
    assert l2_norm(subtract(short, whole)) < 1e-5 * l2_norm(whole)
    model = resident_model(config)
    model.load({name: torch.ones_like(value) for name, value in model.state().items() if ".lora_B." in name})
    assert site_states(model, site_of(config, model), config) is None


def test_lower_blocks_are_run_once(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"target_modules": UPPER["bert"]})
    model = resident_model(config)
    site = site_of(config, model)
    start = initial_adapter(model, config.seed)
    runs = [0, 0]
    for depth in (0, 1):
        layer = model.module.get_submodule(f"base_model.model.bert.encoder.layer.{depth}.intermediate")
        layer.register_forward_hook(lambda *_, depth=depth: runs.__setitem__(depth, runs[depth] + 1))
    for round_number in (1, 2):
        train_locally(model, site, config, start, trained_names(config, start), round_number, None)
    assert runs == [1, 6]
    evaluator = Evaluator(model, config, load_federated_data(config.data, config.seed).test)
    first, again = evaluator(start), evaluator(start)
    assert first == again
    assert runs == [2, 8]


def test_evaluation_is_that_of_all_blocks(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(adapter={"target_modules": UPPER["bert"]})
    model = resident_model(config)
    test = load_federated_data(config.data, config.seed).test
    torch.manual_seed(0)
    adapter = {name: 0.2 * torch.randn_like(value) for name, value in model.state().items()}
    short = Evaluator(model, config, test)(adapter)
    monkeypatch.setattr(common.evaluation, "FROZEN_BYTES", 0)
    whole = Evaluator(model, config, test)(adapter)
    assert short.overall["loss"] == pytest.approx(whole.overall["loss"], rel=1e-5)
    assert short.overall["accuracy"] == whole.overall["accuracy"]


def test_what_cannot_be_saved_or_held_is_not_kept(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    model = resident_model(config)
    assert changing_block(model, head_only=False) == 0
    assert site_states(model, site_of(config, model), config) is None
    config = make_config(adapter={"target_modules": UPPER["bert"]})
    model = resident_model(config)
    site = site_of(config, model)
    needed = sum(site.lengths) * TOKEN_BYTES
    for room, held in ((needed, True), (needed - 1, False)):
        found = frozen_states(model, site.rows, Limit(rows=5), head_only=False, room_bytes=room)
        assert (found is not None) == held
    xlnet = make_config("xlnet")
    assert site_states(resident_model(xlnet), site, xlnet) is None


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_which_sites_have_states_follows_from_the_data_whoever_is_asked_first(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    config = make_config(adapter={"target_modules": UPPER["bert"]})
    model = resident_model(config)
    forget_virtual_sites()  # as in a worker that has seen no site
    sites = [virtual_site(config, {"partition-id": number, "num-partitions": 3}, model) for number in range(3)]
    tokens = [sum(own.lengths) for own in sites]
    assert [own.tokens_before for own in sites] == [0, tokens[0], tokens[0] + tokens[1]]
    monkeypatch.setattr(client.training.features, "FROZEN_BYTES", (tokens[0] + tokens[1]) * TOKEN_BYTES)
    for number in (*order, *order):
        assert (site_states(model, sites[number], config) is not None) == (number < 2)


def test_states_of_other_data_make_room(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [make_config(adapter={"target_modules": UPPER["bert"]}, data=ROWS_OF[rows]) for rows in ROWS_OF]
    model = resident_model(configs[0])
    sites = [site_of(config, model) for config in configs]
    sizes = [sum(own.lengths) * TOKEN_BYTES for own in sites]
    monkeypatch.setattr(client.training.features, "FROZEN_BYTES", max(sizes))
    monkeypatch.setattr(client.training.features, "_STATES", WeakKeyDictionary())
    for own, config in zip([*sites, *sites], [*configs, *configs], strict=True):
        found = site_states(model, own, config)
        assert found is not None
        known = [states for _, states in client.training.features._STATES.values() if states is not None]
        assert known == [found]


def test_states_are_computed_as_the_run_asks(make_config: Callable[..., RunConfig]) -> None:
    seen = []
    for size in ("auto", 2, "auto"):
        config = make_config(adapter={"target_modules": UPPER["bert"]}, training={"micro_batch_size": size})
        model = resident_model(config)
        seen.append(site_states(model, site_of(config, model), config))
    auto, small, again = seen
    assert auto is not None
    assert again is not None
    assert small is not None
    assert small is not auto
    assert torch.equal(auto.table, again.table)
    torch.testing.assert_close(small.table, auto.table)


def test_states_are_those_of_the_rows_asked_for(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"target_modules": UPPER["bert"]})
    model = resident_model(config)
    site = site_of(config, model)
    found = frozen_states(model, site.rows, Limit(rows=3), head_only=False, room_bytes=10**9)
    assert found is not None
    chosen = [5, 0, 3]
    batch = Collator(model.base.tokenizer.pad_token_id)([site.rows[index] for index in chosen])
    with torch.no_grad():
        expected = model.states(batch.input_ids, batch.attention_mask, 1)
        torch.testing.assert_close(found.start(chosen).states, expected)
        torch.testing.assert_close(
            model.logits(batch.input_ids, batch.attention_mask, found.start(chosen)),
            model.logits(batch.input_ids, batch.attention_mask),
        )
