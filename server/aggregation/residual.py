"""Methods that keep what an average of factors loses: FLoRA, FedEx-LoRA and LoRA-FAIR.

FLoRA (2409.05976) stacks the factors, ΔW = [w₁B₁ ... w_KB_K][A₁; ...; A_K] = Σ w BA, of any ranks, and adds ΔW to the
base; the next round starts from B = 0 and a new A.

FedEx-LoRA (2410.09432) averages both factors and adds the residual Σ w BA - B̄Ā to the base, so that B̄Ā plus the
residual is Σ w BA.

Here the base is not rewritten: what is added to it is kept as a correction in factors (``fixed_B fixed_A``), compressed
by QR and a small SVD, of rank min(m, n) at most.

LoRA-FAIR (2411.14961) averages both factors and adds to B̄ the ΔB that brings (B̄ + ΔB)Ā near Σ w BA, with a penalty
on ΔB. The paper minimises a cosine-based distance by gradient descent; here it is the squared Frobenius distance,
whose minimum is known,

    ΔB = argmin ‖Σ w BA - (B̄ + ΔB)Ā‖² + λ ‖ΔB‖² = (Σ w BA - B̄Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹,

the best that can be done by changing B alone as λ goes to 0. It is taken from the SVD of Ā, which no Ā makes singular.
"""

from __future__ import annotations

from functools import partial

import torch

from common.factors import A, B, Factors, compressed, fixed_of, fixed_tensors, layers_of, product_norm, settled, stacked
from common.tensors import Tensors
from server.aggregation.decomposition import ridge_inverse
from server.aggregation.gathered import Gathered
from server.aggregation.rest import averaged_rest

ROUNDING = 1e-7
"""What of a residual is below this share of ‖Σ w BA‖ is rounding of float32 factors: it is not kept."""


def finish_flora(gathered: Gathered, adapter: Tensors) -> Tensors:
    """Return ``adapter`` with Σ w BA added to its correction, and B = 0."""
    following = averaged_rest(gathered, adapter)
    for layer in layers_of(adapter):
        total = stacked(gathered.factors(layer), gathered.weights())
        following |= fixed_tensors(layer, settled(compressed, stacked([fixed_of(adapter, layer), total])))
        following[layer + B] = torch.zeros_like(adapter[layer + B])
    return following


def finish_fedex(gathered: Gathered, adapter: Tensors) -> Tensors:
    """Return ``adapter`` with both factors averaged and the residual added to its correction."""
    following = averaged_rest(gathered, adapter)
    for layer in layers_of(adapter):
        following |= {layer + B: gathered.mean(layer + B).float(), layer + A: gathered.mean(layer + A).float()}
        total = stacked(gathered.factors(layer), gathered.weights())
        average = Factors(following[layer + B].double(), following[layer + A].double())
        residual = stacked([total, average], [1.0, -1.0])
        kept = settled(partial(compressed, floor=ROUNDING * product_norm(total)), residual)
        before = fixed_of(adapter, layer)
        following |= fixed_tensors(layer, settled(compressed, stacked([before, kept])) if before.rank else kept)
    return following


def finish_lora_fair(gathered: Gathered, adapter: Tensors, penalty: float) -> Tensors:
    """Return ``adapter`` with A averaged, and B averaged and moved towards what reproduces Σ w BA.

    Args:
        gathered: factors of one rank.
        adapter: of the round.
        penalty: λ, positive.
    """
    following = averaged_rest(gathered, adapter)
    for layer in layers_of(adapter):
        mean_b, mean_a = gathered.mean(layer + B), gathered.mean(layer + A)
        total = stacked(gathered.factors(layer), gathered.weights())
        v, w = ridge_inverse(mean_a, penalty)
        moved = mean_b + (total.b @ (total.a @ v) - mean_b @ (mean_a @ v)) @ w
        following |= {layer + B: moved.float(), layer + A: mean_a.float()}
    return following
