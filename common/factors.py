"""Low-rank products kept as factors: BA with B [m, q] and A [q, n], never the dense [m, n].

A sum of products is a product of stacked factors, Σ w BA = [w₁B₁ ... w_KB_K][A₁; ...; A_K]. Its SVD comes from a QR
decomposition of both stacks and the SVD of a small square matrix, in float64. Names of a layer's tensors:

=====================  =========  ==================================================================================
``P.lora_A.weight``    [r, n]     the factor A that PEFT saves
``P.lora_B.weight``    [m, r]     the factor B
``P.lora_R.weight``    [r, r]     the core of Fed-SB, ΔW = B R A
``P.fixed_A.weight``   [q, n]     correction to the base, kept beside the frozen weight: ΔW = BA + fixed_B fixed_A
``P.fixed_B.weight``   [m, q]
=====================  =========  ==================================================================================

All are scaled by α/r in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.factor_names import FIXED_A as FIXED_A
from common.factor_names import FIXED_B as FIXED_B
from common.factor_names import A as A
from common.factor_names import B as B
from common.factor_names import R as R
from common.factor_names import is_factor as is_factor
from common.factor_names import is_fixed as is_fixed
from common.tensors import Manifest, Tensors

T = TypeVar("T")

ZERO = 1e-8
"""Singular values below this share of the largest are dropped: tensors are float32, whose resolution is 6e-8."""


class Factors(NamedTuple):
    """A product of two factors.

    Attributes:
        b: [m, q].
        a: [q, n].
    """

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Number q of columns of b and rows of a."""
        return len(self.a)


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers that have a factor A among ``names``, sorted."""
    return sorted(name.removesuffix(A) for name in names if name.endswith(A))


def factors_of(tensors: Mapping[str, Tensor], layer: str) -> Factors:
    """Return B and A of a layer in float64; B R for B where there is a core."""
    b, a = tensors[layer + B].double(), tensors[layer + A].double()
    return Factors(b @ tensors[layer + R].double() if layer + R in tensors else b, a)


def fixed_of(tensors: Mapping[str, Tensor], layer: str) -> Factors:
    """Return the correction of a layer in float64, of rank 0 where there is none."""
    if layer + FIXED_A in tensors:
        return Factors(tensors[layer + FIXED_B].double(), tensors[layer + FIXED_A].double())
    b, a = tensors[layer + B], tensors[layer + A]
    return Factors(torch.zeros(len(b), 0, dtype=torch.float64), torch.zeros(0, a.shape[1], dtype=torch.float64))


def stacked(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Return the factors of Σ w BA, of rank Σ q.

    Args:
        parts: products of one shape.
        weights: w of each; 1 if not given.
    """
    scales = [1.0] * len(parts) if weights is None else weights
    return Factors(
        torch.cat([weight * part.b for weight, part in zip(scales, parts, strict=True)], dim=1),
        torch.cat([part.a for part in parts], dim=0),
    )


def singular(product: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, k], σ [k] and Vᵀ [k, n] of a product, largest first, from QR of both factors and a small SVD.

    U and V have orthonormal columns, also for σ = 0. Signs are fixed: the largest entry of a column of U is positive.

    Args:
        product: of rank q.
        rank: k, most singular values; all min(m, n, q) if not given.
    """
    q_b, r_b = torch.linalg.qr(product.b.double())
    q_a, r_a = torch.linalg.qr(product.a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    k = len(s) if rank is None else min(rank, len(s))
    left, right = q_b @ u[:, :k], vt[:k] @ q_a.T
    signs = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True))) if k else left.new_ones(1, 0)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, s[:k], right * signs.T


def compressed(product: Factors, floor: float = 0.0) -> Factors:
    """Return a product with as few columns as it takes, the singular values shared evenly by both factors.

    Args:
        product: of any rank.
        floor: singular values up to it are dropped, besides those up to :data:`ZERO` times the largest.
    """
    if product.rank == 0:
        return product
    u, s, vt = singular(product)
    kept = int((s > max(floor, ZERO * float(s[0]))).sum())
    root = s[:kept].sqrt()
    return Factors(u[:, :kept] * root, root.unsqueeze(1) * vt[:kept])


def settled(decompose: Callable[[Factors], T], product: Factors) -> T:
    """Return ``decompose(product)``; of the same product turned where its SVD does not converge.

    The SVD is LAPACK's divide and conquer, which on rare matrices raises. The product is then turned: with
    core = R_B R_Aᵀ of its QR decompositions and V the eigenvectors of coreᵀ core, BA = (Q_B core V)(Vᵀ Q_Aᵀ) is the
    same product whatever V's rounding, and the core of that is diagonal but for rounding, where the SVD has nothing
    left to iterate on.

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


def product_norm(product: Factors) -> float:
    """Return the Frobenius norm of a product, from the Gram matrices of its factors."""
    square = ((product.b.T @ product.b) * (product.a @ product.a.T)).sum()
    return float(square.clamp(min=0.0).sqrt())


def with_rank(tensors: Mapping[str, Tensor], rank: int) -> Tensors:
    """Return the tensors with factors cut to the first ``rank`` rows of A and columns of B; corrections stay whole."""
    cut: Tensors = {}
    for name, value in tensors.items():
        cut[name] = value[:rank] if name.endswith((A, R)) else value
        if name.endswith((B, R)):
            cut[name] = cut[name][:, :rank]
    return cut


def fixed_ranks(adapter: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the rank of each layer's correction in order of name; empty where no layer has one."""
    ranks = tuple(len(adapter[layer + FIXED_A]) if layer + FIXED_A in adapter else 0 for layer in layers_of(adapter))
    return ranks if any(ranks) else ()


def fixed_manifest(adapter: Mapping[str, Tensor], ranks: Sequence[int]) -> Manifest:
    """Return the shapes of the correction that has these ranks; see :func:`fixed_ranks`.

    Args:
        adapter: the whole adapter, for layers and shapes.
        ranks: of each layer in order of name, or empty.

    Raises:
        ValueError: for another number of layers, or a rank above the smaller side of a layer.
    """
    layers = layers_of(adapter)
    if ranks and len(ranks) != len(layers):
        raise ValueError(f"a correction has {len(ranks)} ranks; expected one for each of {len(layers)} layers")
    manifest: Manifest = {}
    for layer, rank in zip(layers, ranks, strict=False):
        m, n = len(adapter[layer + B]), adapter[layer + A].shape[1]
        if rank > min(m, n):
            raise ValueError(f"a correction has rank {rank}; expected at most {min(m, n)}, the layer's smaller side")
        if rank:
            manifest |= {layer + FIXED_B: (m, rank), layer + FIXED_A: (rank, n)}
    return manifest


def fixed_tensors(layer: str, correction: Factors) -> Tensors:
    """Return a correction under the layer's names in float32; nothing for one of rank 0."""
    if correction.rank == 0:
        return {}
    return {layer + FIXED_B: correction.b.float().contiguous(), layer + FIXED_A: correction.a.float().contiguous()}


def joined(adapter: Mapping[str, Tensor]) -> tuple[Tensors, int | None]:
    """Return the same adapter as plain factors A and B of one rank: corrections stacked on, cores multiplied into B.

    Layers get the largest rank that any of them needs, filled up with zeros, as most programs that serve adapters want
    one rank. A layer with a correction is compressed first; one without keeps its factors, to the bit.

    Args:
        adapter: whole adapter.

    Returns:
        The tensors, and the rank of all factors (None where there are none); the scale stays α/r of the run.
    """
    plain = {name: value.contiguous() for name, value in adapter.items() if not is_fixed(name)}
    pairs: dict[str, Factors] = {}
    for layer in layers_of(adapter):
        if layer + FIXED_A in adapter:
            pairs[layer] = settled(compressed, stacked([factors_of(adapter, layer), fixed_of(adapter, layer)]))
        elif plain.pop(layer + R, None) is not None:
            pairs[layer] = factors_of(adapter, layer)
        else:
            pairs[layer] = Factors(plain[layer + B], plain[layer + A])
    rank = max((max(pair.rank, 1) for pair in pairs.values()), default=None)
    for layer, pair in pairs.items():
        b, a = (torch.zeros(len(pair.b), rank or 0), torch.zeros(rank or 0, pair.a.shape[1]))
        b[:, : pair.rank], a[: pair.rank] = pair.b, pair.a
        plain |= {layer + B: b, layer + A: a}
    return plain, rank
