"""Corrections, cores and factors of another rank in the model: what it computes is what the tensors say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ModelError
from common.factors import (
    A,
    B,
    Factors,
    R,
    compressed,
    factors_of,
    fixed_manifest,
    fixed_of,
    fixed_ranks,
    fixed_tensors,
    joined,
    layers_of,
    singular,
    with_rank,
)
from common.models.adapter import AdaptedModel, adapt, fresh_factors, initial_adapter
from common.models.base import load_base
from common.tensors import Tensors, manifest_of
from tests.tiny_models import FAMILIES

CPU = torch.device("cpu")
IDS = torch.tensor([[2, 5, 6, 7, 9], [2, 8, 11, 4, 10]])


def load(config: RunConfig, core: bool = False) -> AdaptedModel:
    model = adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU, core=core)
    model.module.eval()
    return model


def randomised(model: AdaptedModel, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {name: value + 0.3 * torch.randn_like(value) for name, value in initial_adapter(model, 0).items()}


def logits(model: AdaptedModel, adapter: Tensors) -> Tensor:
    model.load(adapter)
    with torch.no_grad():
        return model.logits(IDS, torch.ones_like(IDS))


def with_corrections(adapter: Tensors, rank: int) -> Tensors:
    whole = dict(adapter)
    for layer in layers_of(adapter):
        b, a = adapter[layer + B], adapter[layer + A]
        whole |= fixed_tensors(layer, Factors(0.3 * torch.randn(len(b), rank), 0.3 * torch.randn(rank, a.shape[1])))
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_correction_computes_what_the_joined_adapter_of_higher_rank_does(
    make_config: Callable[..., RunConfig], family: str
) -> None:
    config = make_config(family)
    model = load(config)
    plain = randomised(model)
    whole = with_corrections(plain, 3)
    got = logits(model, whole)
    one, rank = joined(whole)
    assert rank == 5
    wider = load(make_config(family, adapter={"rank": 5, "alpha": config.adapter.alpha * 5 / 2}))
    torch.testing.assert_close(got, logits(wider, one), rtol=1e-4, atol=1e-5)
    assert float((got - logits(model, plain)).abs().max()) > 1e-3
    for layer in layers_of(plain):
        total, fixed = factors_of(whole, layer), fixed_of(whole, layer)
        torch.testing.assert_close(
            one[layer + B] @ one[layer + A], (total.b @ total.a + fixed.b @ fixed.a).float(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_core_computes_bra_and_starts_at_the_base_from_leading_singular_vectors(
    make_config: Callable[..., RunConfig], family: str
) -> None:
    config = make_config(family)
    model, plain = load(config, core=True), load(config)
    start = initial_adapter(model, 3)
    assert all(torch.equal(value, initial_adapter(load(config, core=True), 3)[name]) for name, value in start.items())
    zero = initial_adapter(plain, 3)
    torch.testing.assert_close(logits(model, start), logits(plain, zero), rtol=1e-5, atol=1e-6)
    for layer in layers_of(start):
        base: Any = plain.module.get_submodule(layer)
        weight = base.get_base_layer().weight.detach().double()
        weight = weight.T if base.fan_in_fan_out else weight
        best = torch.linalg.svdvals(weight)[:2]
        found = torch.linalg.svdvals(start[layer + B].double().T @ weight @ start[layer + A].double().T)
        torch.testing.assert_close(found, best, rtol=1e-3, atol=0)
        torch.testing.assert_close(start[layer + A] @ start[layer + A].T, torch.eye(2), rtol=0, atol=2e-3)
    moved = {name: torch.randn_like(value) if name.endswith(R) else value for name, value in start.items()}
    torch.testing.assert_close(logits(model, moved), logits(plain, joined(moved)[0]), rtol=1e-4, atol=1e-5)


def test_whole_adapter_without_a_correction_has_none_and_a_partial_one_leaves_it(
    make_config: Callable[..., RunConfig],
) -> None:
    model = load(make_config())
    plain = randomised(model)
    before = logits(model, plain)
    whole = with_corrections(plain, 1)
    corrected = logits(model, whole)
    assert torch.equal(logits(model, {name: plain[name] for name in list(plain)[:2]}), corrected)
    assert torch.equal(logits(model, plain), before)
    with pytest.raises(ModelError, match="has no factors"):
        model.load({**plain, "nowhere.fixed_A.weight": torch.ones(1, 1), "nowhere.fixed_B.weight": torch.ones(1, 1)})


def test_factors_of_lower_rank_train_as_a_model_of_that_rank_at_the_same_scale(
    make_config: Callable[..., RunConfig],
) -> None:
    model = load(make_config(adapter={"rank": 4, "alpha": 8}))
    small = load(make_config(adapter={"rank": 1, "alpha": 2}))
    full = randomised(model)
    for adapter in (full, with_rank(full, 1), full, with_rank(full, 3), with_rank(full, 1)):
        model.load(adapter)
        model.train_only(frozenset(adapter))
        model.logits(IDS, torch.ones_like(IDS)).square().sum().backward()
        assert manifest_of(model.parameters) == manifest_of(adapter)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters.values())
    small.load(adapter)
    small.logits(IDS, torch.ones_like(IDS)).square().sum().backward()
    for name, parameter in small.parameters.items():
        torch.testing.assert_close(model.parameters[name].grad, parameter.grad)


def test_correction_passes_gradients_to_the_layers_below(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    model, wider = load(config), load(make_config(adapter={"rank": 4, "alpha": 8}))
    whole = with_corrections(randomised(model), 2)
    one, rank = joined(whole)
    assert rank == 4
    for chosen, adapter in ((model, whole), (wider, one)):
        chosen.load(adapter)
        chosen.train_only(frozenset(chosen.parameters))
        chosen.logits(IDS, torch.ones_like(IDS)).square().sum().backward()
    head = "base_model.model.classifier.weight"
    torch.testing.assert_close(model.parameters[head].grad, wider.parameters[head].grad, rtol=1e-4, atol=1e-4)


def test_fresh_factors_repeat_by_round_and_start_as_the_run_does(make_config: Callable[..., RunConfig]) -> None:
    start = initial_adapter(load(make_config()), 5)
    first, second, again = (fresh_factors(start, 5, number) for number in (1, 2, 2))
    assert all(torch.equal(first[name], value) for name, value in start.items())
    assert all(torch.equal(second[name], again[name]) for name in start)
    assert all(torch.equal(second[name], start[name]) != name.endswith(A) for name in start)


def test_svd_of_a_product_is_the_dense_one_and_orthonormal_where_it_is_zero() -> None:
    torch.manual_seed(0)
    product = Factors(torch.randn(9, 4), torch.randn(4, 7))
    u, s, vt = singular(product)
    torch.testing.assert_close(s, torch.linalg.svdvals(product.b.double() @ product.a.double())[:4])
    torch.testing.assert_close((u * s) @ vt, product.b.double() @ product.a.double())
    u, s, vt = singular(Factors(torch.zeros(9, 4), torch.randn(4, 7)))
    assert not s.any()
    torch.testing.assert_close(vt @ vt.T, torch.eye(4, dtype=torch.float64))
    assert compressed(Factors(torch.zeros(9, 4), torch.randn(4, 7))).rank == 0
    assert compressed(Factors(torch.randn(3, 50), torch.randn(50, 4))).rank == 3


def test_manifest_of_a_correction_follows_its_ranks_and_refuses_others(make_config: Callable[..., RunConfig]) -> None:
    plain = initial_adapter(load(make_config()), 0)
    whole = with_corrections(plain, 3)
    ranks = fixed_ranks(whole)
    assert ranks == (3,) * len(layers_of(plain))
    assert fixed_ranks(plain) == ()
    found = fixed_manifest(plain, ranks)
    assert found == {name: shape for name, shape in manifest_of(whole).items() if name not in plain}
    for wrong in ((3,), (999,) * len(ranks)):
        with pytest.raises(ValueError, match="expected"):
            fixed_manifest(plain, wrong)
