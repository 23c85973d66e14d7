"""HetLoRA (2401.06432): factors of mixed ranks, zero-padded and averaged with weights by the norm of each product.

With S_k = ‖B_k A_k‖_F and p_k = w_k S_k / Σ w_j S_j, Ā = Σ p A and B̄ = Σ p B over factors filled up with zeros to the
run's rank; a site of rank r_k is sent the first r_k rows of Ā and columns of B̄. Rows of A that no site of the round
trained stay as they were, beside zero columns of B, where zeros in both would never get a gradient again. A site whose
own product is small, as a sparse one's, counts less. Weights are by layer here. The site's self-pruning of its rank,
which the paper adds, is not done: a site's rank is its owner's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.factors import A, B, layers_of, product_norm
from common.tensors import Tensors
from server.aggregation.gathered import Gathered
from server.aggregation.rest import averaged_rest

LEAST_SHARE = 1e-6
"""Sites that count less train no row: what is left of one would be too short for B to get a gradient."""


def finish(gathered: Gathered, adapter: Tensors) -> Tensors:
    """Return the next adapter, of the rank of ``adapter``; the plain mean where every product is zero."""
    following = averaged_rest(gathered, adapter)
    for layer in layers_of(adapter):
        factors, weights = gathered.factors(layer), gathered.weights()
        sized = [weight * product_norm(one) for weight, one in zip(weights, factors, strict=True)]
        total = sum(sized)
        shares = [size / total for size in sized] if total > 0 else weights
        rank = len(adapter[layer + A])
        trained = max(one.rank for share, one in zip(shares, factors, strict=True) if share > LEAST_SHARE)
        b = sum((share * _padded(one.b.T, rank).T for share, one in zip(shares, factors, strict=True)), torch.zeros(()))
        a = sum((share * _padded(one.a, rank) for share, one in zip(shares, factors, strict=True)), torch.zeros(()))
        a[trained:] = adapter[layer + A][trained:]
        following |= {layer + B: b.float().contiguous(), layer + A: a.float()}
    return following


def _padded(rows: Tensor, rank: int) -> Tensor:
    """Fill rows [r, n] up with zero rows to [rank, n]."""
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])
