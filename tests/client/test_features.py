"""Head-only training on features computed once trains as it does on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import client.training.loop
from client.site import virtual_site
from client.training.features import row_features
from client.training.loop import train_locally
from common.config.run import RunConfig
from common.data.batches import Collator
from common.methods import trained_names
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.tensors import Tensors, l2_norm, subtract

HEAD_ONLY = {"kind": "head_only"}


def trained(config: RunConfig, *, short_cut: bool, monkeypatch: pytest.MonkeyPatch) -> Tensors:
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    start = initial_adapter(model, config.seed)
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    with monkeypatch.context() as patch:
        if not short_cut:
            patch.setattr(client.training.loop, "row_features", lambda *_: None)
        return train_locally(model, site, config, start, trained_names(config, start), 1, mechanism).update


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"unit": "example", "noise_multiplier": 0.5}])
@pytest.mark.parametrize("pooling", ["family", "mean"])
def test_update_is_that_of_the_whole_model(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, pooling: str, privacy: dict[str, Any],
) -> None:  # fmt: skip
    model = {"pooling": pooling}
    config = make_config(adapter=HEAD_ONLY, privacy=privacy, model=model, training={"optimizer": "sgd", "lr": 0.3})
    whole, short = (trained(config, short_cut=used, monkeypatch=monkeypatch) for used in (False, True))
    assert l2_norm(subtract(short, whole)) < 1e-5 * l2_norm(whole)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama", "gpt2"])
def test_head_that_sees_every_token_takes_no_short_cut(make_config: Callable[..., RunConfig], family: str) -> None:
    config = make_config(family, adapter=HEAD_ONLY)
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    assert row_features(model, site, config) is None
    lora = make_config()
    assert row_features(resident_model(lora), site, lora) is None


def test_features_give_the_logits_and_the_base_is_run_once(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter=HEAD_ONLY)
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 1, "num-partitions": 3}, model)
    model.load(initial_adapter(model, 0))
    found = row_features(model, site, config)
    assert found is not None
    assert row_features(model, site, config) is found
    batch = Collator(model.base.tokenizer.pad_token_id)([site.rows[index] for index in (5, 0, 3)])
    torch.testing.assert_close(found.logits([5, 0, 3]), model.logits(batch.input_ids, batch.attention_mask))
