"""No method, measure or robust rule ever makes a tensor as large as a dense [m, n] matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.methods import METHODS
from server.aggregation.products import measure
from server.aggregation.robust import BY_ENTRY, coefficients, combine_by_entry, combine_by_site
from tests.server.factor_rounds import FactorRound, random_round

M, N, RANK = 53, 67, 2


class NothingDense(TorchDispatchMode):
    """Fails at the first tensor with as many elements as a matrix of M x N."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and value.numel() >= M * N:
                raise AssertionError(f"{func} made a tensor of shape {tuple(value.shape)}")
        return made


def test_a_dense_product_is_noticed() -> None:
    left, right = torch.ones(M, RANK), torch.ones(RANK, N)
    with NothingDense(), pytest.raises(AssertionError, match="made a tensor of shape"):
        left @ right


@pytest.mark.parametrize("method", METHODS)
def test_rounds_stay_factored(method: str) -> None:
    ranks = [1, 2, 2, 2] if METHODS[method].mixed_ranks else [RANK] * 4
    first = random_round(method, M, N, ranks, seed=3, with_correction=METHODS[method].corrects)
    with NothingDense():
        after = first.aggregate(method)
        again = FactorRound(after, first.updates, first.weights)
        last = again.aggregate(method)
        measure(after, last, {site: again.local(site) for site in again.updates}, again.weights)


@pytest.mark.parametrize("rule", ["norm_clip", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum"])
def test_robust_rules_stay_factored_where_they_can(rule: str) -> None:
    """Rules by norms and distances need inner products alone; the coordinate-wise ones take each factor's entries."""
    current = random_round("ffa_lora", M, N, [RANK] * 5, seed=4)
    with NothingDense():
        if rule in BY_ENTRY:
            combine_by_entry(rule, 1, current.updates)
        else:
            shares = coefficients(rule, 1, current.adapter, current.updates, current.weights, 1.0)
            combine_by_site(current.updates, shares)
