"""Methods that split an aggregated product anew by its singular value decomposition: FlexLoRA and FedSVD.

FlexLoRA (2402.11505): ΔW = Σ w B_k A_k over factors of any rank, U Σ Vᵀ = SVD(ΔW), and a site with rank r_k is sent
B = U_{1..r_k} Σ_{1..r_k} and A = V_{1..r_k}ᵀ. Exact up to the truncation to the run's rank. Where the sites of a round
have less than that rank together, B ends in zeros and Vᵀ in further orthonormal rows, so that the product is the same
and the next sites can train there: with zeros in both factors no gradient would ever reach either.

FedSVD (2505.12805): sites train B with A fixed; ΔW = (Σ w B_k) A = Σ w B_k A exactly; U Σ Vᵀ = SVD(ΔW) gives the next
B = U Σ and A = Vᵀ. Nothing is lost, since ΔW has rank r, and A with orthonormal rows bounds the gradient of B. It is
post-processing of a sum, so that any differential privacy of the sum holds for the result.

Both work on stacked factors: QR of both, then the SVD of a matrix of at most Σ r_k columns.
"""

from __future__ import annotations

from functools import partial

import torch

from common.factors import A, B, Factors, factors_of, layers_of, settled, singular, stacked
from common.tensors import Tensors, add
from server.aggregation.gathered import Gathered
from server.aggregation.rest import averaged_rest


def finish_flexlora(gathered: Gathered, adapter: Tensors) -> Tensors:
    """Return the next adapter: the best approximation of Σ w BA at the rank of ``adapter``, the rest averaged."""
    following = averaged_rest(gathered, adapter)
    for layer in layers_of(adapter):
        total = stacked(gathered.factors(layer), gathered.weights())
        before = factors_of(adapter, layer)
        if total.rank < before.rank:  # a zero product, whose rows of A keep the rest of Vᵀ apart from zero
            total = stacked([total, Factors(torch.zeros_like(before.b), before.a)])
        following |= _split(layer, total, before.rank)
    return following


def finish_fedsvd(mean: Tensors, adapter: Tensors) -> Tensors:
    """Return the next adapter: B averaged, then B = U Σ and A = Vᵀ of the product."""
    following = add(adapter, mean)
    for layer in layers_of(following):
        following |= _split(layer, factors_of(following, layer), len(following[layer + A]))
    return following


def _split(layer: str, product: Factors, rank: int) -> Tensors:
    """Return U Σ and Vᵀ of a product as the factors of a layer, filled up with zeros to ``rank``."""
    u, s, vt = settled(partial(singular, rank=rank), product)
    b, a = (u * s).new_zeros(len(u), rank), vt.new_zeros(rank, vt.shape[1])
    b[:, : len(s)], a[: len(s)] = u * s, vt
    return {layer + B: b.float(), layer + A: a.float()}
