"""Every aggregation method on the worst factors that admission lets in: no error, no value that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.federation import AggregationConfig
from common.factors import A, B, Factors, R, compressed, settled, singular, turned
from common.methods import METHODS
from common.tensors import Tensors
from server.aggregation.catalog import aggregator_of
from server.aggregation.decomposition import ridge_inverse
from server.aggregation.gathered import LARGEST_VALUE
from tests.server.factor_rounds import dense, random_round, relative_error

TINY = 1e-45
"""Denormal in float32."""


def signs(value: Tensor) -> Tensor:
    return torch.where(value < 0, -1.0, 1.0)


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "all the largest": lambda value: torch.full_like(value, LARGEST_VALUE),
    "largest of any sign": lambda value: LARGEST_VALUE * signs(value),
    "largest of rank 1": lambda value: LARGEST_VALUE * signs(value[:1]) * signs(value[:, :1]),
    "zero": torch.zeros_like,
    "denormal": lambda value: torch.full_like(value, TINY),
    "rank 1": lambda value: value[:1] * value[:, :1],
    "largest and 1e-30": lambda value: torch.where(value < 0, LARGEST_VALUE, 1e-30),
    "rows of the largest and of 1e-30": lambda value: torch.where(value[:, :1] < 0, LARGEST_VALUE, 1e-30) + 0 * value,
    "largest and denormal": lambda value: torch.where(value < 0, LARGEST_VALUE, TINY),
    "one entry": lambda value: torch.zeros_like(value).index_fill(0, torch.tensor(0), LARGEST_VALUE),
}


def aggregated(
    method: str, m: int, n: int, rank: int, count: int, spoil: Callable[[Tensor], Tensor], ends: tuple[str, ...]
) -> Tensors:
    """A round of which the first site brings factors with these endings that ``spoil`` made of honest ones."""
    current = random_round(method, m, n, [rank] * count, 1)
    aggregator, linear = aggregator_of(AggregationConfig(method=method)), METHODS[method].linear
    state = aggregator.init({name: current.adapter[name] for name in current.updates["site 0"]})
    for site, sent in current.updates.items():
        local = current.local(site)
        values = sent if linear else {name: local[name] for name in sent}
        if site == "site 0":
            values = {name: spoil(value) if name.endswith(ends) else value for name, value in values.items()}
        state = aggregator.update(state, site, values, current.weights[site])
    return aggregator.finish(state.mean() if linear else state, current.adapter)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_fails_on_finite_factors(method: str, kind: str) -> None:
    for m, n, rank in ((384, 384, 4), (6, 5, 4), (3, 2, 8)):
        for count in (1, 3):
            for ends in ((A, B, R), (A,), (B,)):
                found = aggregated(method, m, n, rank, count, HOSTILE[kind], ends)
                assert all(bool(value.isfinite().all()) for value in found.values()), (m, n, rank, count, ends)


@pytest.mark.parametrize("penalty", [1e-9, 0.01, 10.0])
@pytest.mark.parametrize("kind", [None, *HOSTILE])
def test_ridge_inverse_is_that_of_the_singular_values(kind: str | None, penalty: float) -> None:
    a = torch.randn(4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = a if kind is None else HOSTILE[kind](a)
    v, w = ridge_inverse(a, penalty)
    torch.testing.assert_close(v.T @ v, torch.eye(4, dtype=torch.float64))
    assert bool(w.isfinite().all())
    assert float(torch.linalg.matrix_norm(w, 2)) <= 0.5 / penalty**0.5 * (1 + 1e-9)
    if kind is None:
        wanted = a.T @ torch.linalg.inv(a @ a.T + penalty * torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(v @ w, wanted, rtol=1e-9, atol=1e-12)


def stubborn(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the SVD raise so many times, as one that does not converge."""
    real, left = torch.linalg.svd, [times]

    def svd(matrix: Tensor, **keys: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return real(matrix, **keys)

    monkeypatch.setattr(torch.linalg, "svd", svd)


@pytest.mark.parametrize("method", ["flora", "flexlora", "fedex_lora", "lora_fair", "fedsvd"])
def test_svd_that_does_not_converge_changes_no_result(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = random_round(method, 12, 9, [3] * 4, 1, with_correction=method in ("flora", "fedex_lora"))
    wanted = current.aggregate(method)
    once = []

    def failing(decompose: Callable[[Factors], Any], product: Factors) -> Any:
        stubborn(monkeypatch, 1)
        once.append(method)
        return settled(decompose, product)

    for module in ("residual", "svd", "decomposition"):
        monkeypatch.setattr(f"server.aggregation.{module}.settled", failing)
    found = current.aggregate(method)
    assert len(once) >= 2  # of both layers
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_svd_that_never_converges_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn(monkeypatch, 2)
    with pytest.raises(torch.linalg.LinAlgError):
        settled(singular, Factors(torch.ones(3, 2).double(), torch.ones(2, 4).double()))


@pytest.mark.parametrize("rank", [1, 3, 8, 40])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-12])
def test_turned_product_is_the_same_with_orthogonal_sides(rank: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    b = torch.randn(20, rank, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, rank) ** -1
    a = torch.randn(rank, 15, generator=generator, dtype=torch.float64)
    a[rank // 2 :] *= spread
    found = turned(Factors(b, a))
    assert relative_error(found.b @ found.a, b @ a) < 1e-13
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(found.rank, dtype=torch.float64))
    (_, s, _), (_, wanted, _) = singular(found), singular(Factors(b, a))
    torch.testing.assert_close(s, wanted[: len(s)], rtol=1e-9, atol=1e-13 * float(wanted[0]))


def test_zero_product_stays_of_rank_0_when_it_is_turned() -> None:
    zero = Factors(torch.zeros(5, 2).double(), torch.zeros(2, 4).double())
    assert compressed(turned(zero)).rank == 0


def test_lora_fair_leaves_one_site_its_own_product_at_the_largest_values() -> None:
    found = aggregated("lora_fair", 6, 5, 4, 1, HOSTILE["all the largest"], (A, B))
    wanted = torch.full((6, 5), 4 * LARGEST_VALUE**2, dtype=torch.float64)
    assert relative_error(dense(found, "one"), wanted) < 1e-6
