"""A ridge regression on what sites sent, which must not fail for any finite numbers that admission takes."""

from __future__ import annotations

import torch
from torch import Tensor

from common.factors import Factors, settled, singular


def ridge_inverse(a: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return V and W of Aᵀ (A Aᵀ + λ I)⁻¹ = V W, finite for any finite A.

    With A = U Σ Vᵀ, W = diag(σ / (σ² + λ)) Uᵀ: unlike A Aᵀ + λ I, it can be had where λ is less than the rounding of
    A Aᵀ. Singular values that are rounding of the largest are taken as 0.

    Args:
        a: A, float64 [r, n].
        penalty: λ, positive.

    Returns:
        V [n, k] with orthonormal columns and W [k, r], k = min(r, n).
    """
    u, s, vt = settled(singular, Factors(torch.eye(len(a), dtype=a.dtype), a))
    rounding = max(a.shape) * torch.finfo(a.dtype).eps * s[:1]
    factors = torch.where(s > rounding, s / (s.square() + penalty), 0.0)
    return vt.T, factors.unsqueeze(1) * u.T
