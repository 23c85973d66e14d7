"""What a round's aggregation did to the products BA, whatever the method: error, norms, cosines, drift.

Let P_0k = B A be the round's product as site k got it, at its rank, P_k = B_k A_k the site's after training,
M = Σ w P_k, and N the product that the method made of them, with what it added to the correction. Then

* error: ‖N - M‖_F / ‖M‖_F, which is 0 for an exact method;
* update norm of site k: ‖P_k - P_0k‖_F;
* cosines between the updates P_k - P_0k of two sites;
* drift: sqrt(Σ w ‖P_k - M‖²_F), how far sites went apart.

Norms are over all layers together. All follow from one matrix of inner products of the P_0k, the P_k and N, and an
inner product of products needs no product: ⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ), in float64. By cancellation, an error or a
drift below about 1e-7 of ‖M‖ is not told from 0. The factors are those without the scale α/r.

That matrix grows with the square of the number of sites. Of more than :data:`MOST_PAIRED` the same measures follow from
each site's own norm, from ‖M‖² and ‖N - M‖², and from drift² = Σ w ‖P_k‖² - ‖M‖²; cosines are then of the pairs among
so many sites, evenly spaced in order of name.

Where a product is not known at the coordinator, as under FedSA-LoRA, whose B stay at the sites, or where there are no
factors, the same is measured of tensors as they are sent, in the place of the products.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from common.factors import A, B, Factors, R, factors_of, fixed_of, layers_of, product_norm, stacked, with_rank
from common.tensors import Tensors

_RESOLUTION = 1e-14
"""Squared norms below this share of the largest inner product are rounding: taken as 0."""

_BLOCK = 2048
"""Most ranks whose inner products with all others are held at once, twice: 5 GB for 10,000 sites of rank 16."""

MOST_PAIRED = 32
"""Most sites of which every pair is looked at."""


@dataclass(frozen=True)
class RoundProducts:
    """The measures of a round; see the module.

    Attributes:
        error: None where M is zero, or the products are not known.
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
    alone: Collection[str] = (),
) -> RoundProducts | None:
    """Measure a round.

    Args:
        before: whole adapter that the round started from.
        after: whole adapter that the method made.
        local: by site, its own whole adapter after training; factors may be of a lower rank.
        weights: of the sites; not normalised.
        alone: names of tensors, of one shape at all sites, that are measured in the place of the products.

    Returns:
        None where there is nothing to measure.
    """
    sites, layers = sorted(local), layers_of(before)
    if not sites or not (layers or alone):
        return None
    share = torch.tensor([weights[site] for site in sites], dtype=torch.float64)
    share /= share.sum()
    held = [0 if alone else max(len(local[site][layer + A]) for layer in layers) for site in sites]
    ranks = sorted(set(held))
    tensors = (
        _LayerRound([_as_product(before[name])], [_as_product(local[site][name]) for site in sites],
                    _as_product(after[name]))
        for name in sorted(alone)
    )  # fmt: skip
    products = (
        _LayerRound(
            [_at_rank(before, layer, rank) for rank in ranks],
            [factors_of(local[site], layer) for site in sites],
            stacked([total_of(after, layer), fixed_of(before, layer)], [1.0, -1.0]),
        )
        for layer in layers
    )  # one layer in float64 at a time
    rounds = tensors if alone else products
    given = torch.tensor([ranks.index(rank) for rank in held])
    return (_measured_of_all if len(sites) <= MOST_PAIRED else _measured_of_many)(sites, rounds, share, given)


@dataclass(frozen=True)
class _LayerRound:
    """The products of a layer in a round: each P_0k that differs, each P_k, and N."""

    firsts: list[Factors]
    own: list[Factors]
    made: Factors


def _at_rank(adapter: Mapping[str, Tensor], layer: str, rank: int) -> Factors:
    """Return the product of a layer as a site of ``rank`` is sent it."""
    whole = {layer + end: adapter[layer + end] for end in (A, B, R) if layer + end in adapter}
    return factors_of(with_rank(whole, rank), layer)


def _as_product(value: Tensor) -> Factors:
    """Return a tensor's entries as a product of one row."""
    return Factors(torch.ones(1, 1, dtype=torch.float64), value.double().reshape(1, -1))


def total_of(adapter: Mapping[str, Tensor], layer: str) -> Factors:
    """Return what an adapter changes in a layer, its correction included, without α/r."""
    return stacked([factors_of(adapter, layer), fixed_of(adapter, layer)])


def inner_products(products: Sequence[Factors]) -> Tensor:
    """Return ⟨P_i, P_j⟩_F of N products, float64 [N, N]; entries of at most :data:`_BLOCK` ranks at a time."""
    whole, count = stacked(products), len(products)
    owner = torch.repeat_interleave(torch.arange(count), torch.tensor([one.rank for one in products]))
    found = whole.a.new_zeros(count, count)
    for start in range(0, len(owner), _BLOCK):
        part = slice(start, start + _BLOCK)
        entries = (whole.b[:, part].T @ whole.b).mul_(whole.a[part] @ whole.a.T)
        found.index_add_(0, owner[part], entries.new_zeros(len(entries), count).index_add_(1, owner, entries))
    return found


def _measured_of_all(sites: list[str], rounds: Iterable[_LayerRound], share: Tensor, given: Tensor) -> RoundProducts:
    size = int(given.max()) + 1 + len(sites) + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    for one in rounds:
        gram += inner_products([*one.firsts, *one.own, one.made])
    return _measured(sites, gram, share, given)


def _measured_of_many(sites: list[str], rounds: Iterable[_LayerRound], share: Tensor, given: Tensor) -> RoundProducts:
    count, starts = len(sites), int(given.max()) + 1
    own, with_first = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    first, mean, error = torch.zeros(starts, dtype=torch.float64), 0.0, 0.0
    paired = [count * place // MOST_PAIRED for place in range(MOST_PAIRED)]
    gram = torch.zeros(starts + MOST_PAIRED + 1, starts + MOST_PAIRED + 1, dtype=torch.float64)
    for one in rounds:
        gram[:-1, :-1] += inner_products([*one.firsts, *(one.own[place] for place in paired)])
        whole, shared = stacked(one.own), stacked(one.own, share.tolist())
        owner = torch.repeat_interleave(torch.arange(count), torch.tensor([product.rank for product in one.own]))
        for place, start in enumerate(one.firsts):
            entries = ((start.b.T @ whole.b) * (start.a @ whole.a.T)).sum(dim=0)
            with_first.index_add_(0, owner, torch.where(given[owner] == place, entries, 0.0))
            first[place] += product_norm(start) ** 2
        own += torch.tensor([product_norm(product) ** 2 for product in one.own], dtype=torch.float64)
        of_mean, of_error = _squares(shared, one.made)
        mean, error = mean + of_mean, error + of_error
    tiny = _RESOLUTION * max(float(own.max()), float(first.max()))
    mean, error = (value if value > tiny else 0.0 for value in (mean, error))
    drift = float(share @ own) - mean
    norms = (own - 2.0 * with_first + first[given]).clamp(min=0.0)
    few = share[paired] / share[paired].sum()
    cosines = _measured([sites[place] for place in paired], gram, few, given[paired], starts)
    return RoundProducts(
        error=(error / mean) ** 0.5 if mean > 0 else None,
        drift=drift**0.5 if drift > tiny else 0.0,
        update_norms=dict(zip(sites, torch.where(norms > tiny, norms, 0.0).sqrt().tolist(), strict=True)),
        cosine_mean=cosines.cosine_mean,
        cosine_min=cosines.cosine_min,
    )


def _squares(mean: Factors, made: Factors) -> tuple[float, float]:
    """Return ‖M‖²_F and ‖N - M‖²_F by the cheaper way: inner products, or the products, some rows at a time."""
    rows, columns = len(mean.b), mean.a.shape[1]
    if mean.rank * (rows + columns) <= rows * columns:
        gram = inner_products([mean, made])
        return float(gram[0, 0]), float(gram[0, 0] - 2.0 * gram[0, 1] + gram[1, 1])
    of_mean = of_error = 0.0
    step = max(1, rows // 8)
    for start in range(0, rows, step):
        part = mean.b[start : start + step] @ mean.a
        of_mean += float(part.square().sum())
        of_error += float((made.b[start : start + step] @ made.a - part).square().sum())
    return of_mean, of_error


def _measured(sites: list[str], gram: Tensor, share: Tensor, given: Tensor, starts: int | None = None) -> RoundProducts:
    count, starts = len(sites), int(given.max()) + 1 if starts is None else starts
    last = starts + count
    tiny = _RESOLUTION * float(gram.diagonal().max())

    def square(direction: Tensor) -> float:
        """‖Σ c_i P_i‖² for coefficients c."""
        value = float(direction @ gram @ direction)
        return value if value > tiny else 0.0

    unit = torch.eye(last + 1, dtype=torch.float64)
    mean = torch.zeros(last + 1, dtype=torch.float64)
    mean[starts:last] = share
    updates = unit[starts:last] - unit[given]
    norms = [square(update) ** 0.5 for update in updates]
    size = square(mean)
    inner = updates @ gram @ updates.T
    cosines = [
        float(inner[i, j]) / (norms[i] * norms[j])
        for i in range(count) for j in range(i) if norms[i] > 0 and norms[j] > 0
    ]  # fmt: skip
    return RoundProducts(
        error=(square(unit[last] - mean) / size) ** 0.5 if size > 0 else None,
        drift=sum(float(w) * square(unit[starts + k] - mean) for k, w in enumerate(share)) ** 0.5,
        update_norms=dict(zip(sites, norms, strict=True)),
        cosine_mean=fmean(cosines) if cosines else None,
        cosine_min=min(cosines, default=None),
    )
