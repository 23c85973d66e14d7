"""Server optimizers: the aggregated update taken as a gradient step to be smoothed (Reddi et al. 2003.00295, Alg. 2).

With Δ the weighted mean of the sites' updates, η the server's learning rate, and m = v = 0 at the start:

* FedAvgM (Hsu et al. 1909.06335): m ← β₁ m + Δ, step η m;
* FedAdagrad: m ← β₁ m + (1 - β₁) Δ, v ← v + Δ²;
* FedAdam: the same m, v ← β₂ v + (1 - β₂) Δ²;
* FedYogi: the same m, v ← v - (1 - β₂) Δ² sign(v - Δ²);

the last three step η m / (√v + τ). There is no bias correction, as in the paper, where v starts at τ² or above; here at
τ². FedAdagrad takes β₁ = 0 in the paper; set ``server_beta1: 0`` for that. All are functions of the sum alone, so that
they are post-processing of whatever makes it private.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from common.config.federation import AggregationConfig
from common.tensors import Tensors

Second = Callable[[Tensor, Tensor, float], Tensor]
"""From v, Δ² and β₂ to the next v."""


def _adagrad(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return v + square


def _adam(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return beta2 * v + (1.0 - beta2) * square


def _yogi(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return v - (1.0 - beta2) * square * torch.sign(v - square)


SECOND_MOMENTS: dict[str, Second | None] = {
    "fedavgm": None, "fedadagrad": _adagrad, "fedadam": _adam, "fedyogi": _yogi,
}  # fmt: skip


def optimized(
    update: Mapping[str, Tensor], moments: Mapping[str, Tensor], settings: AggregationConfig
) -> tuple[Tensors, Tensors]:
    """Return the step to take and the next moments.

    Args:
        update: Δ by name.
        moments: ``m.<name>`` and ``v.<name>`` of the rounds before; those that are missing start afresh.
        settings: which optimizer, and its rates.

    Returns:
        The step, float32, and the moments, float32: their bits survive a checkpoint.
    """
    second = SECOND_MOMENTS[settings.server_optimizer]
    beta1, tau = settings.server_beta1, settings.server_tau
    step: Tensors = {}
    following = dict(moments)
    for name, value in sorted(update.items()):
        delta = value.double()
        m = moments.get(f"m.{name}", torch.zeros_like(value)).double()
        m = (beta1 * m + (1.0 if second is None else 1.0 - beta1) * delta).float()
        following[f"m.{name}"] = m
        direction = m.double()
        if second is not None:
            v = moments.get(f"v.{name}", torch.full_like(value, tau**2)).double()
            v = second(v, delta.square(), settings.server_beta2).float()
            following[f"v.{name}"] = v
            direction = direction / (v.double().sqrt() + tau)
        step[name] = (settings.server_lr * direction).float()
    return step, following
