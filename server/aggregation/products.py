"""What a round's aggregation did to the products BA, whatever the method: error, norms, cosines, drift.

Let P_0 = B A be the round's product, P_k = B_k A_k each site's after training, M = Σ w P_k, and N the product that the
method made of them, with what it added to the correction. Then

* error: ‖N - M‖_F / ‖M‖_F, which is 0 for an exact method;
* update norm of site k: ‖P_k - P_0‖_F;
* cosines between the updates P_k - P_0 of two sites;
* drift: sqrt(Σ w ‖P_k - M‖²_F), how far sites went apart.

Norms are over all layers together. All follow from one matrix of inner products of P_0, ..., P_K, N, and an inner
product of products needs no product: ⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ), in float64. By cancellation, an error or a drift
below about 1e-7 of ‖M‖ is not told from 0. The factors are those without the scale α/r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from common.factors import Factors, factors_of, fixed_of, layers_of, stacked
from common.tensors import Tensors

_RESOLUTION = 1e-14
"""Squared norms below this share of the largest inner product are rounding: taken as 0."""


@dataclass(frozen=True)
class RoundProducts:
    """The measures of a round; see the module.

    Attributes:
        error: None where M is zero.
        drift: 0 for one site.
        update_norms: by site.
        cosine_mean: over pairs of sites; None for one site, or where an update is zero.
        cosine_min: of the pair that agrees least.
    """

    error: float | None
    drift: float
    update_norms: dict[str, float]
    cosine_mean: float | None
    cosine_min: float | None


def measure(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    local: Mapping[str, Tensors],
    weights: Mapping[str, float],
) -> RoundProducts | None:
    """Measure a round.

    Args:
        before: whole adapter that the round started from.
        after: whole adapter that the method made.
        local: by site, its own whole adapter after training; factors may be of a lower rank.
        weights: of the sites; not normalised.

    Returns:
        None where there are no factors.
    """
    sites, layers = sorted(local), layers_of(before)
    if not layers or not sites:
        return None
    count = len(sites)
    gram = torch.zeros(count + 2, count + 2, dtype=torch.float64)
    for layer in layers:
        made = stacked([_total(after, layer), fixed_of(before, layer)], [1.0, -1.0])
        gram += inner_products([factors_of(before, layer), *(factors_of(local[site], layer) for site in sites), made])
    share = torch.tensor([weights[site] for site in sites], dtype=torch.float64)
    share /= share.sum()
    return _measured(sites, gram, share)


def _total(adapter: Mapping[str, Tensor], layer: str) -> Factors:
    return stacked([factors_of(adapter, layer), fixed_of(adapter, layer)])


def inner_products(products: Sequence[Factors]) -> Tensor:
    """Return ⟨P_i, P_j⟩_F of N products, float64 [N, N]."""
    whole = stacked(products)
    entries = (whole.b.T @ whole.b) * (whole.a @ whole.a.T)
    owner = torch.repeat_interleave(torch.arange(len(products)), torch.tensor([one.rank for one in products]))
    rows = entries.new_zeros(len(products), entries.shape[1]).index_add_(0, owner, entries)
    return entries.new_zeros(len(products), len(products)).index_add_(1, owner, rows)


def _measured(sites: list[str], gram: Tensor, share: Tensor) -> RoundProducts:
    count, last = len(sites), len(sites) + 1
    tiny = _RESOLUTION * float(gram.diagonal().max())

    def square(direction: Tensor) -> float:
        """‖Σ c_i P_i‖² for coefficients c."""
        value = float(direction @ gram @ direction)
        return value if value > tiny else 0.0

    unit = torch.eye(count + 2, dtype=torch.float64)
    mean = torch.zeros(count + 2, dtype=torch.float64)
    mean[1:last] = share
    updates = unit[1:last] - unit[0]
    norms = [square(update) ** 0.5 for update in updates]
    size = square(mean)
    inner = updates @ gram @ updates.T
    cosines = [
        float(inner[i, j]) / (norms[i] * norms[j])
        for i in range(count) for j in range(i) if norms[i] > 0 and norms[j] > 0
    ]  # fmt: skip
    return RoundProducts(
        error=(square(unit[last] - mean) / size) ** 0.5 if size > 0 else None,
        drift=sum(float(w) * square(unit[1 + k] - mean) for k, w in enumerate(share)) ** 0.5,
        update_norms=dict(zip(sites, norms, strict=True)),
        cosine_mean=fmean(cosines) if cosines else None,
        cosine_min=min(cosines, default=None),
    )
