"""The geometric median of many sites, nearly half of which collude far away, against one found on dense vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.aggregation import robust

DIMENSION = 40


def median_weights(rows: Tensor, share: Tensor | None = None) -> Tensor:
    even = torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64)
    return robust.RULES["geometric_median"](rows @ rows.T, even if share is None else share, 0)


def sites(count: int, bad: int, distance: float, seed: int = 0) -> Tensor:
    """Updates of norm about 1 around one point; the first ``bad`` stand together at a distance."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, DIMENSION, generator=generator, dtype=torch.float64) / DIMENSION**0.5
    rows[:, 0] += 1.0
    if bad:
        rows[:bad] = distance * torch.nn.functional.normalize(rows[-1], dim=0)
    return rows


def sum_of_distances(rows: Tensor, weights: Tensor, share: Tensor) -> float:
    return float(share @ (rows - weights @ rows).norm(dim=1))


@pytest.mark.parametrize("distance", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("count", [3, 5, 21, 51, 201])
def test_nearly_half_of_the_sites_cannot_move_it_however_far_they_are(count: int, distance: float) -> None:
    bad = (count - 1) // 2
    rows = sites(count, bad, distance)
    weights = median_weights(rows)
    spread = float((rows[bad:] - rows[bad:].mean(dim=0)).norm(dim=1).max())
    assert float((weights @ rows - rows[bad:].mean(dim=0)).norm()) < max(spread, 1.0) * count**0.5
    assert float(weights[:bad].sum()) * distance < max(spread, 1.0) * count**0.5


@pytest.mark.parametrize(("count", "distance"), [(21, 1e3), (21, 1e6), (51, 1e3), (51, 1e6)])
def test_what_it_ends_at_is_the_minimum_and_more_iterations_move_it_no_more(
    count: int, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sites(count, (count - 1) // 2, distance)
    ended = median_weights(rows) @ rows
    monkeypatch.setattr(robust, "SETTLED", 0.0)
    torch.testing.assert_close(ended, median_weights(rows) @ rows, rtol=0, atol=1e-5)
    towards = torch.nn.functional.normalize(rows - ended, dim=1)
    assert float(towards.mean(dim=0).norm()) < 1e-6  # the gradient of the mean distance


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**32), exponent=st.floats(-3.0, 3.0))
def test_no_site_nor_their_mean_is_nearer_to_all(count: int, seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0**exponent * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    share = torch.rand(count, generator=generator, dtype=torch.float64) + 0.01
    share /= share.sum()
    weights = median_weights(rows, share)
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1.0)
    found = sum_of_distances(rows, weights, share)
    for other in (*torch.eye(count, dtype=torch.float64), share):
        assert found <= sum_of_distances(rows, other, share) * (1 + 1e-5)


def test_bad_sites_of_large_weight_below_half_cannot_move_it() -> None:
    rows = sites(9, 2, 1e6)
    share = torch.tensor([0.24] * 2 + [0.52 / 7] * 7, dtype=torch.float64)
    weights = median_weights(rows, share)
    assert float((weights @ rows - rows[2:].mean(dim=0)).norm()) < 10.0


def test_two_sites_count_the_same() -> None:
    torch.testing.assert_close(median_weights(torch.eye(2, dtype=torch.float64)), torch.full((2,), 0.5).double())


@pytest.mark.parametrize("rows", [torch.zeros(5, 3), torch.full((5, 3), 2.0**20), torch.full((5, 3), 1e-45)])
def test_equal_sites_have_finite_weights(rows: Tensor) -> None:
    weights = median_weights(rows.double())
    torch.testing.assert_close(weights, torch.full((5,), 0.2).double())
