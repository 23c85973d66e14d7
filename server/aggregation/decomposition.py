"""Decompositions of what sites sent, which must not fail for any finite numbers that admission takes.

The SVD of a product (``common.factors``) is LAPACK's divide and conquer, which on rare matrices does not converge and
raises. The product is then turned: with core = R_B R_Aᵀ of its QR decompositions and V the eigenvectors of coreᵀ core,
BA = (Q_B core V)(Vᵀ Q_Aᵀ) is the same product whatever V's rounding, and the core of that is diagonal but for rounding,
where the SVD has nothing left to iterate on. Should it raise there too, the error is passed on: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from common.factors import Factors, singular

T = TypeVar("T")


def settled(decompose: Callable[[Factors], T], product: Factors) -> T:
    """Return ``decompose(product)``; of the same product turned where its SVD does not converge.

    Raises:
        torch.linalg.LinAlgError: if the SVD of the turned product does not converge either.
    """
    try:
        return decompose(product)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return decompose(turned(product))


def turned(product: Factors) -> Factors:
    """Return the same product with factors whose columns and rows are orthogonal but for rounding, longest first."""
    q_b, r_b = torch.linalg.qr(product.b.double())
    q_a, r_a = torch.linalg.qr(product.a.double().T)
    core = r_b @ r_a.T
    v = torch.linalg.eigh(core.T @ core).eigenvectors.flip(1)
    return Factors(q_b @ (core @ v), v.T @ q_a.T)


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
