"""The packed forward pass gives what the padded one gives: logits, loss and gradients, for every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.models.adapter import AdaptedModel
from common.models.layout import segments
from common.models.packing import padded
from common.models.resident import resident_model
from common.tensors import Tensors, l2_norm, subtract
from tests.tiny_models import CAUSAL, FAMILIES

LENGTHS = (5, 9, 2, 9, 1, 24, 7, 3)
"""Of rows in no order, so that attention has to sort them, and long enough for more than one group."""

ROUNDING = 1e-5
"""Of float32 sums in another order, relative: the CPUs at hand gave up to 2.1e-6."""

SET_UPS = [
    *((family, "classification", "family", "lora") for family in FAMILIES if family != "xlnet"),
    *((family, "causal_lm", "family", "lora") for family in sorted(CAUSAL)),
    *((family, "classification", "mean", "lora") for family in ("bert", "roberta", "distilbert")),
    *((family, "classification", "family", "head_only") for family in ("bert", "gpt2", "llama")),
]


def prepared(make_config: Callable[..., RunConfig], family: str, task: str, **sections: Any) -> AdaptedModel:
    source = make_config(family, task).model.source
    sections["model"] = {"source": source, **sections.get("model", {})}
    model = resident_model(make_config(family, task, **sections))
    torch.manual_seed(1)
    model.load({name: 0.2 * torch.randn_like(value) for name, value in model.state().items()})
    model.train_only(frozenset(model.parameters))
    model.module.train()
    return model


def rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, [B, T]."""
    torch.manual_seed(2)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(4, 40, mask.shape) * mask, mask


def logits_and_gradients(model: AdaptedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensors]:
    logits = model.logits(ids, mask)
    if logits.dim() == 3:
        logits = logits * mask[..., None]  # what a language model says at padding is nobody's business
    weights = torch.linspace(1.0, 2.0, logits.numel()).view_as(logits)
    (logits * weights).sin().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.parameters.items() if p.grad is not None}
    model.train_only(frozenset(model.parameters))
    return logits.detach(), gradients


@pytest.mark.parametrize(("family", "task", "pooling", "kind"), SET_UPS)
def test_packed_pass_is_the_padded_one(
    make_config: Callable[..., RunConfig], family: str, task: str, pooling: str, kind: str
) -> None:
    targets = {"target_modules": "all-linear"} if kind == "lora" else {}
    model = prepared(make_config, family, task, model={"pooling": pooling}, adapter={"kind": kind, **targets})
    assert model.packs
    ids, mask = rows()
    logits, gradients = logits_and_gradients(model, ids, mask)
    with padded():
        expected, slow = logits_and_gradients(model, ids, mask)
    assert float((logits - expected).norm()) < ROUNDING * float(expected.norm())
    assert gradients.keys() == slow.keys()
    assert l2_norm(subtract(gradients, slow)) < ROUNDING * l2_norm(slow)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(ids, mask) * (mask[..., None] if task == "causal_lm" else 1), logits)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_blocks_see_the_tokens_that_exist_and_the_rest_sees_rows(
    make_config: Callable[..., RunConfig], family: str
) -> None:
    model = prepared(make_config, family, "classification")
    seen: dict[str, tuple[tuple[int, ...], Any]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: (tuple(inputs[0].shape), segments())})
        )
        for name, layer in model.module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    ids, mask = rows()
    model.logits(ids, mask)
    for handle in handles:
        handle.remove()
    assert model.base.family.blocks is not None
    inside = {name: shape for name, shape in seen.items() if f".{model.base.family.blocks.path}." in name}
    outside = {name: shape for name, shape in seen.items() if name not in inside}
    packed, narrow = ((1, sum(LENGTHS)), LENGTHS), ((1, len(LENGTHS)), (1,) * len(LENGTHS))
    found = {name: (shape[:2], rows) for name, (shape, rows) in inside.items()}
    assert len(found) > 10
    for name, how in found.items():
        whole = f".{model.base.family.blocks.path}.1." not in name or ".key" in name or ".value" in name
        assert how == (packed if whole or ".k_proj" in name or ".v_proj" in name else narrow), name
    assert outside
    assert all(shape[0] == len(LENGTHS) and rows is None for shape, rows in outside.values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_padding_token_inside_a_row_is_a_token(make_config: Callable[..., RunConfig], family: str) -> None:
    model = prepared(make_config, family, "classification", adapter={"target_modules": "all-linear"})
    ids, mask = rows()
    ids[5, 20:] = 0  # decoders read the token before
    ids[0] = 0
    logits, gradients = logits_and_gradients(model, ids, mask)
    with padded():
        expected, slow = logits_and_gradients(model, ids, mask)
    torch.testing.assert_close(logits, expected)
    assert l2_norm(subtract(gradients, slow)) < ROUNDING * l2_norm(slow)


def test_nothing_is_left_on_the_model(make_config: Callable[..., RunConfig]) -> None:
    model = prepared(make_config, "bert", "classification")
    ids, mask = rows()
    layers = list(model.module.modules())
    before = [[*layer._forward_hooks, *layer._forward_pre_hooks] for layer in layers]
    model.logits(ids, mask)
    with pytest.raises(IndexError):
        model.logits(ids + 10_000, mask)
    assert segments() is None
    assert [[*layer._forward_hooks, *layer._forward_pre_hooks] for layer in layers] == before
    direct = model.module(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(direct, model.logits(ids, mask))


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("xlnet", {}),
        ("bert", {"model": {"gradient_checkpointing": True}}),
        ("bert", {"adapter": {"kind": "prompt", "virtual_tokens": 3}}),
    ],
)
def test_what_does_not_fit_is_padded(
    make_config: Callable[..., RunConfig], family: str, sections: dict[str, Any]
) -> None:
    assert not prepared(make_config, family, "classification", **sections).packs


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("what", ["no token", "token at padding"])
def test_row_that_cannot_be_packed_is_padded(make_config: Callable[..., RunConfig], family: str, what: str) -> None:
    model = prepared(make_config, family, "classification")
    ids, mask = rows((3, 0, 2) if what == "no token" else (3, 1, 2))
    if what == "token at padding":
        ids[1] = 5
    with padded():
        expected = model.logits(ids, mask)
    torch.testing.assert_close(model.logits(ids, mask), expected)
