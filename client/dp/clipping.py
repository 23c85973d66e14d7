"""Clipping: what each example or person may add to a sum, and the clip norm that follows the data.

Per-unit gradients g_u are clipped to C as g_u min(1, C / ‖g_u‖) (Abadi et al. 1607.00133). Sums are kept in float64, so
that one unit more or less moves them by C and not by the rounding of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.config.privacy import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM
from common.privacy.planning import Mechanism
from common.randomness import CryptoStream
from common.wire import LARGEST_LOSS


def layer_groups(names: Sequence[str]) -> list[list[int]]:
    """Group parameters, by position, by the layer they belong to: factors A and B, or weight and bias, go together."""
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        layer = name.rpartition(".")[0].removesuffix(".lora_A").removesuffix(".lora_B")
        groups.setdefault(layer, []).append(position)
    return list(groups.values())


def unit_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norms of each unit's part of every gradient [U, ...]: as many tensors [U], float64.

    In float32 the squares of small gradients vanish and sums over many entries lose digits; either would let a unit
    past the clip norm. A unit whose gradient is not finite is set to zero in place: clipping would turn it into NaN
    whatever the noise, and so tell that it was there. Zero is within every clip norm.
    """
    norms = [torch.linalg.vector_norm(g.flatten(start_dim=1), dim=1, dtype=_exact(g)) for g in gradients]
    finite = torch.isfinite(joint_norm(norms))
    if not bool(finite.all()):
        for gradient in gradients:
            gradient[~finite] = 0.0
        norms = [norm.masked_fill(~finite, 0.0) for norm in norms]
    return norms


def joint_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm [U] of several parts together, from the norm of each."""
    return torch.stack(list(norms)).square().sum(dim=0).sqrt()


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / norm) of each unit, 1 for a norm of zero."""
    return torch.where(norms > bound, bound / norms.clamp(min=1e-300), 1.0)


def weighted_sum(gradient: Tensor, factors: Tensor) -> Tensor:
    """Return Σ_u f_u g_u of a gradient [U, ...] and factors [U], in the dtype of the factors."""
    flat = gradient.flatten(start_dim=1).to(factors.dtype)
    return (factors @ flat).view(gradient.shape[1:])


def _exact(value: Tensor) -> torch.dtype:
    """Float64, but float32 on a device that has none."""
    return torch.float32 if value.device.type == "mps" else torch.float64


class MovingClip:
    """The clip norm C of a mechanism, and how it moves.

    Adaptive clipping (Andrew et al. 1905.03871, algorithm 1) multiplies C by exp(-η (b̃ - γ)) after every step, where b̃
    is the noisy share of units whose norm is at most C. The count Σ (b_u - 1/2) has sensitivity 1/2; its noise is
    accounted with the gradient's.

    Args:
        mechanism: the mechanism.
        quantile: γ, the share that should be left unclipped.
        lr: η.
        start: C to begin with; the mechanism's if not given.
    """

    def __init__(self, mechanism: Mechanism, quantile: float, lr: float, start: float | None = None) -> None:
        self.value = mechanism.clip_norm if start is None else start
        self.adaptive = mechanism.clipping == "adaptive"
        self._mechanism, self._quantile, self._lr = mechanism, quantile, lr
        self._count = 0.0

    def observe(self, norms: Tensor) -> None:
        """Count the units of a micro-batch whose norm is at most C."""
        if self.adaptive:
            self._count += float((norms <= self.value).sum()) - 0.5 * len(norms)

    def move(self, stream: CryptoStream) -> None:
        """End a step: move C by the noisy count."""
        if not self.adaptive:
            return
        noisy = self._count + 0.5 * self._mechanism.quantile_noise * float(stream.normal((1,)))
        share = noisy / self._mechanism.expected_batch_size + 0.5
        moved = self.value * math.exp(max(-20.0, min(20.0, -self._lr * (share - self._quantile))))
        self.value = min(LARGEST_CLIP_NORM, max(SMALLEST_CLIP_NORM, moved))
        self._count = 0.0


class ReleasedLoss:
    """The mean loss of a round through the Gaussian mechanism: each unit's loss cut to [0, bound], summed, noised.

    Args:
        mechanism: the mechanism; ``loss_share`` 0 withholds the loss.
        bound: largest loss of a unit that counts, in nats.
    """

    def __init__(self, mechanism: Mechanism, bound: float) -> None:
        self._mechanism, self._bound = mechanism, bound
        self._sum, self._steps = 0.0, 0

    @property
    def withheld(self) -> bool:
        """Whether nothing is to be released."""
        return self._mechanism.loss_share == 0.0

    def observe(self, losses: Tensor) -> None:
        """Add the losses of units [U]; NaN counts as the bound."""
        if not self.withheld:
            cut = losses.detach().double().nan_to_num(nan=self._bound).clamp(0.0, self._bound)
            self._sum += float(cut.sum())

    def end_step(self, stream: CryptoStream) -> None:
        """End a step: add its noise."""
        if not self.withheld:
            self._sum += self._mechanism.loss_noise * self._bound * float(stream.normal((1,)))
            self._steps += 1

    def value(self) -> float | None:
        """Return the released mean over the steps so far, in nats, cut to what the wire takes; None where withheld."""
        if self.withheld:
            return None
        mean = self._sum / (max(1, self._steps) * self._mechanism.expected_batch_size)
        return max(-LARGEST_LOSS, min(LARGEST_LOSS, mean))
