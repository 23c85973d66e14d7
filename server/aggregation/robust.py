"""Robust rules: a round's aggregate that some bad sites cannot move far.

Sites are compared on what they change in the model, U_k = (α/r)(B_k A_k - B A) of every layer beside the updates of the
tensors that are no factors, as one long vector. Distances and norms come from one matrix of inner products in float64,
and no product is ever formed.

Where A is sent, the product does not tell all: B_k = s B with A_k = A / s changes nothing, and neither does any A_k
where B is zero or stays at the site, but their mean with those of others does. There the updates of the factors
themselves are compared too: both parts in units of their own median squared norm, and added.

With n sites and f bad ones:

=================  =================================================================================  ==============
rule               aggregate                                                                          holds for
=================  =================================================================================  ==============
norm_clip          weighted mean, each update scaled to the cohort's median ‖U‖ at most               f < n / 2
median             median of each entry of what is sent (Yin et al. 1803.01498)                        f < n / 2
trimmed_mean       mean of each entry without the f smallest and f largest (same)                      f < n / 2
geometric_median   Σ β u with β from Weiszfeld's iteration on U, smoothed (RFA, 1912.13445)            f < n / 2
krum               the update whose n - f - 2 nearest are nearest (Blanchard et al. 2017)              n >= 2f + 3
multi_krum         weighted mean of the n - f best by that score                                       n >= 2f + 3
=================  =================================================================================  ==============

Multi-Krum leaves out as many as may be bad and no more (so does ByzFL's; Blanchard et al. leave the number open): every
honest site that it left out besides would be missed. A bad site among those it keeps is as near to its n - f - 2
nearest as an honest one that it left out.

Krum, Multi-Krum and the geometric median weigh whole sites: their coefficients are not negative and have sum 1. So they
compose with every method: one that needs each site's factors takes them as the sites' weights. The others make an
aggregate of updates, in the place of a linear method's weighted mean.

Median and trimmed mean are of entries, and the entries of a product would be a dense matrix: they are taken of what is
sent, which under methods with one trained factor are the coordinates of the product in a fixed basis. Both ignore
weights, as a large declared one would outvote the rest. Norm clipping and the geometric median do not: there the bad
sites must have less than half of the weight too, which the config check sees to for those asked. Multi-Krum chooses
sites whatever they declare, and averages by weight those it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from common.errors import RunError
from common.factors import A, B, factors_of, is_factor, layers_of, with_rank
from common.tensors import Tensors
from server.aggregation.products import inner_products

ITERATIONS, SETTLED, SMOOTHING = 10_000, 1e-8, 1e-6
"""Of Weiszfeld's iterations: the most, of n² operations each (up to 4 n are needed where nearly half of n collude); the
share of itself that every weight moves by at most in the last; and the distance below which one is smoothed, as a share
of the median norm."""


def expect_enough_sites(rule: str, bad: int, sites: int, where: str) -> None:
    """Check a rule's breakdown condition.

    Raises:
        RunError: if so many bad sites among so many could move the aggregate at will.
    """
    least = 2 * bad + _undecided(rule)
    if sites < least:
        raise RunError(
            f"{where} has {sites} sites but aggregation.robust {rule!r} against {bad} bad ones needs {least}; expected "
            "at least as many. Count more in a round, or lower aggregation.robust_sites."
        )


def held_against(rule: str, hidden: int, wanted: int, sites: int) -> int:
    """Return f for a round: as many of those wanted as its sites can outvote, and all that are hidden.

    Who is found out needs no others to outvote it, but proves nothing of the rest: where the sites suffice, the rule
    holds against as many as if nobody had been found.

    Args:
        rule: name of the rule.
        hidden: bad sites among those that count, which the sites suffice for.
        wanted: ``aggregation.robust_sites``.
        sites: those that count.
    """
    return max(hidden, min(wanted, (sites - _undecided(rule)) // 2))


def _undecided(rule: str) -> int:
    """How many sites a rule needs besides two for each bad one."""
    return 3 if "krum" in rule else 1


def combine_by_entry(rule: str, bad: int, updates: Mapping[str, Tensors]) -> Tensors:
    """Return the robust mean update of a linear method, each entry by itself.

    Args:
        rule: a key of :data:`BY_ENTRY`.
        bad: f, the number of bad sites it must hold against.
        updates: of each site, for what it sent.

    Raises:
        RunError: if the round has too few sites for f.
    """
    ordered = [updates[site] for site in sorted(updates)]
    expect_enough_sites(rule, bad, len(ordered), "the round")
    return {name: BY_ENTRY[rule](_stack(ordered, name), bad).float() for name in ordered[0]}


def combine_by_site(updates: Mapping[str, Tensors], shares: Mapping[str, float]) -> Tensors:
    """Return the robust mean update of a linear method, by what :func:`coefficients` gives each site."""
    sites = sorted(updates)
    ordered = [updates[site] for site in sites]
    counted = torch.tensor([shares[site] for site in sites], dtype=torch.float64)
    return {name: torch.einsum("k,k...->...", counted, _stack(ordered, name)).float() for name in ordered[0]}


def coefficients(
    rule: str, bad: int, adapter: Tensors, updates: Mapping[str, Tensors], weights: Mapping[str, float], scale: float
) -> dict[str, float]:
    """Return what each site's update counts, in order of site; of sum 1, except under norm_clip.

    Args:
        rule: a key of :data:`RULES`.
        bad: f, the number of bad sites it must hold against.
        adapter: whole adapter of the round.
        updates: of each site, for what it sent; factors may be of ranks of their own.
        weights: declared, of each site.
        scale: α/r.

    Raises:
        RunError: if the round has too few sites for f.
    """
    sites = sorted(updates)
    expect_enough_sites(rule, bad, len(sites), "the round")
    share = torch.tensor([weights[site] for site in sites], dtype=torch.float64)
    gram = comparison_products(adapter, [updates[site] for site in sites], scale)
    return dict(zip(sites, RULES[rule](gram, share / share.sum(), bad).tolist(), strict=True))


def comparison_products(adapter: Tensors, updates: Sequence[Tensors], scale: float) -> Tensor:
    """Return the inner products that sites are compared by, float64 [n, n]: of their changes, and of sent factors."""
    changes = change_products(adapter, updates, scale)
    if not any(name.endswith(A) for name in updates[0]):
        return changes
    return _in_own_units(changes) + _in_own_units(factor_products(updates))


def _in_own_units(gram: Tensor) -> Tensor:
    unit = float(gram.diagonal().quantile(0.5))
    return gram / unit if unit > 0 else gram


def factor_products(updates: Sequence[Tensors]) -> Tensor:
    """Return ⟨u_i, u_j⟩ of the sent factors' updates, float64 [n, n]; those of a lower rank end in zeros."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0]:
        if is_factor(name):
            whole = [max(update[name].shape[axis] for update in updates) for axis in (0, 1)]
            rows = torch.zeros(len(updates), *whole, dtype=torch.float64)
            for row, update in zip(rows, updates, strict=True):
                height, width = update[name].shape
                row[:height, :width] = update[name]
            rows = rows.flatten(1)
            gram += rows @ rows.T
    return gram


def change_products(adapter: Tensors, updates: Sequence[Tensors], scale: float) -> Tensor:
    """Return ⟨U_i, U_j⟩ of the sites' changes to the model, float64 [n, n].

    A site of a lower rank was sent the first rows of A and columns of B, and changed their product.
    """
    count = len(updates)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for layer in layers_of(adapter):
        own = {name: adapter[name] for name in adapter if name.startswith(f"{layer}.lora_")}
        ranks = [_rank(update, layer, len(own[layer + A])) for update in updates]
        sent = {rank: with_rank(own, rank) for rank in sorted(set(ranks))}
        local = [
            {name: v + update[name] if name in update else v for name, v in sent[rank].items()}
            for rank, update in zip(ranks, updates, strict=True)
        ]
        whole = inner_products([factors_of(one, layer) for one in (*sent.values(), *local)])
        minus = torch.tensor([[-1.0 if rank == base else 0.0 for base in sent] for rank in ranks], dtype=torch.float64)
        minus = torch.cat([minus, torch.eye(count, dtype=torch.float64)], dim=1)
        gram += scale**2 * (minus @ whole @ minus.T)
    for name in updates[0]:
        if not is_factor(name):
            rows = _stack(updates, name).flatten(1)
            gram += rows @ rows.T
    return gram


def _rank(update: Tensors, layer: str, whole: int) -> int:
    """The rank of a layer's factors in an update; that of the adapter, where it has none of them."""
    if layer + A in update:
        return len(update[layer + A])
    return update[layer + B].shape[1] if layer + B in update else whole


def _stack(updates: Sequence[Tensors], name: str) -> Tensor:
    return torch.stack([update[name].double() for update in updates])


def _distances(gram: Tensor) -> Tensor:
    """Squared distances [n, n] from inner products."""
    own = gram.diagonal()
    return (own.unsqueeze(0) + own.unsqueeze(1) - 2.0 * gram).clamp(min=0.0)


def _norm_clip(gram: Tensor, share: Tensor, bad: int) -> Tensor:
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    bound = norms.quantile(0.5)
    return share * torch.where(norms > bound, bound / norms.clamp(min=1e-300), torch.ones_like(norms))


def _geometric_median(gram: Tensor, share: Tensor, bad: int) -> Tensor:
    """Return Weiszfeld's weights, from the mean of the majority that is nearest to the medoid.

    From the mean of all, what f bad sites weigh would fall by (n - f) / f an iteration and no faster. The medoid is the
    site with the least sum of distances, which bad ones cannot take far, nor a majority next to it. No iteration adds
    to the sum of smoothed distances, so that the aggregate is no worse than that start wherever it ends.
    """
    floor = SMOOTHING * float(gram.diagonal().clamp(min=0.0).sqrt().quantile(0.5)) + 1e-300
    distances = _distances(gram).sqrt()
    medoid = int((distances @ share).argmin())
    gram = gram - gram[medoid] - gram[:, medoid].unsqueeze(1) + gram[medoid, medoid]  # seen from the medoid
    weights = torch.zeros_like(share)
    nearest = distances[medoid].argsort(stable=True)[: len(share) // 2 + 1]
    weights[nearest] = 1.0 / len(nearest)
    for _ in range(ITERATIONS):
        before, middle = weights, gram @ weights
        square = gram.diagonal() - 2.0 * middle + weights @ middle
        weights = share / square.clamp(min=0.0).sqrt().clamp(min=floor)
        weights = weights / weights.sum()
        if bool(((weights - before).abs() <= SETTLED * weights).all()):
            break
    return weights


def krum_scores(gram: Tensor, bad: int) -> Tensor:
    """Return each site's sum of squared distances to its n - f - 2 nearest others: [n]."""
    distances = _distances(gram)
    distances.fill_diagonal_(torch.inf)
    nearest = len(gram) - bad - 2
    return distances.sort(dim=1).values[:, :nearest].sum(dim=1)


def _krum(gram: Tensor, share: Tensor, bad: int) -> Tensor:
    chosen = torch.zeros_like(share)
    chosen[int(krum_scores(gram, bad).argmin())] = 1.0
    return chosen


def _multi_krum(gram: Tensor, share: Tensor, bad: int) -> Tensor:
    best = krum_scores(gram, bad).argsort(stable=True)[: len(gram) - bad]
    chosen = torch.zeros_like(share)
    chosen[best] = share[best]
    return chosen / chosen.sum()


def _median(rows: Tensor, bad: int) -> Tensor:
    ordered = rows.sort(dim=0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2.0


def _trimmed_mean(rows: Tensor, bad: int) -> Tensor:
    return rows.sort(dim=0).values[bad : len(rows) - bad].mean(dim=0)


BY_ENTRY: dict[str, Callable[[Tensor, int], Tensor]] = {"median": _median, "trimmed_mean": _trimmed_mean}
RULES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "norm_clip": _norm_clip, "geometric_median": _geometric_median, "krum": _krum, "multi_krum": _multi_krum,
}  # fmt: skip
"""Rules that give each site a coefficient, from inner products [n, n], weights [n] of sum 1 and f."""
