"""Rounds of random factors, aggregated as the coordinator does, beside the dense computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from common.config.federation import AggregationConfig
from common.factors import A, B, R, factors_of, fixed_of, layers_of
from common.methods import METHODS
from common.tensors import Tensors, add
from server.aggregation.catalog import aggregator_of

LAYERS = ("one", "two")
HEAD = "classifier.weight"


@dataclass(frozen=True)
class FactorRound:
    """A round's start and what each site sent.

    Attributes:
        adapter: whole adapter of the round.
        updates: by site; factors may be of a lower rank.
        weights: by site, not normalised.
    """

    adapter: Tensors
    updates: dict[str, Tensors]
    weights: dict[str, float]

    def local(self, site: str) -> Tensors:
        """The site's whole adapter after training."""
        sent = self.updates[site]
        rank = min((len(v) for n, v in sent.items() if n.endswith(A)), default=None)
        start = {
            n: v if rank is None or not n.endswith((A, B)) else (v[:rank] if n.endswith(A) else v[:, :rank])
            for n, v in self.adapter.items()
        }
        return add(start, sent)

    def aggregate(self, method: str, order: list[str] | None = None) -> Tensors:
        """The next whole adapter."""
        aggregator = aggregator_of(AggregationConfig(method=method))
        sites = list(self.updates) if order is None else order
        sent = self.updates[sites[0]]
        state = aggregator.init({name: self.adapter[name] for name in sent})
        for site in sites:
            local = self.local(site)
            value = self.updates[site] if METHODS[method].linear else {name: local[name] for name in sent}
            state = aggregator.update(state, site, value, self.weights[site])
        return aggregator.finish(state.mean() if METHODS[method].linear else state, self.adapter)

    def dense_target(self, layer: str) -> Tensor:
        """Σ w BA as a dense float64 matrix, with the correction that stood before."""
        total = sum(self.weights.values())
        before = fixed_of(self.adapter, layer)
        parts = [self.weights[site] / total * dense(self.local(site), layer) for site in self.updates]
        return sum(parts, before.b @ before.a)

    def dense_scale(self, layer: str) -> float:
        """Σ w ‖BA‖ and the correction's norm: what float32 can be exact to where the terms of the sum cancel."""
        total = sum(self.weights.values())
        before = fixed_of(self.adapter, layer)
        parts = [self.weights[site] / total * dense(self.local(site), layer) for site in self.updates]
        return sum(float(part.norm()) for part in (*parts, before.b @ before.a))


def dense(adapter: Tensors, layer: str) -> Tensor:
    """BA (or BRA) of a layer as a dense float64 matrix."""
    product = factors_of(adapter, layer)
    return product.b @ product.a


def dense_total(adapter: Tensors, layer: str) -> Tensor:
    """BA plus the correction, dense."""
    fixed = fixed_of(adapter, layer)
    return dense(adapter, layer) + fixed.b @ fixed.a


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got - wanted‖ / ‖wanted‖."""
    return float((got - wanted).norm() / wanted.norm())


def random_round(
    method: str, m: int, n: int, ranks: list[int], seed: int, with_correction: bool = False
) -> FactorRound:
    """A round of sites with these ranks; the adapter has the largest. Odd, so that RoLoRA sends B."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rank, adapter = max(ranks), {HEAD: draw(3, n)}
    for layer in LAYERS:
        adapter |= {layer + A: draw(rank, n), layer + B: draw(m, rank)}
        if METHODS[method].core:
            adapter[layer + R] = draw(rank, rank)
        if METHODS[method].fresh:
            adapter[layer + B] = torch.zeros(m, rank)
        if with_correction:
            adapter |= {layer + ".fixed_A.weight": draw(2, n), layer + ".fixed_B.weight": draw(m, 2)}
    updates = {}
    for number, own in enumerate(ranks):
        sent = {}
        for name, value in sorted(adapter.items()):
            if ".fixed_" in name or not METHODS[method].sends(name, 1):
                continue
            shape = list(value.shape)
            if name.endswith(A):
                shape[0] = own
            elif name.endswith(B):
                shape[1] = own
            sent[name] = draw(*shape)
        updates[f"site {number}"] = sent
    weights = {site: float(torch.rand((), generator=generator)) + 0.01 for site in updates}
    return FactorRound(adapter, updates, weights)


def shapes(mixed: bool) -> st.SearchStrategy[tuple[int, int, list[int], int]]:
    """m, n, ranks of the sites and a seed."""
    size, seeds = st.integers(1, 24), st.integers(0, 2**32)
    rank = st.integers(1, 6)
    same = st.tuples(rank, st.integers(1, 6)).map(lambda drawn: [drawn[0]] * drawn[1])
    ranks = st.lists(rank, min_size=1, max_size=6) if mixed else same
    return st.tuples(size, size, ranks, seeds)


def layer_names(adapter: Tensors) -> list[str]:
    """Layers of an adapter."""
    return layers_of(adapter)
