"""FedProx (Li et al. 1812.06127): a site minimises its loss plus (μ/2) ‖w - w_t‖², w_t being what it received.

The term's gradient μ (w - w_t) depends on no record. So it is added to a step's gradient after clipping and noise, and
costs no privacy.
"""

from __future__ import annotations

from typing import Any

import torch


def add_proximal_term(optimizer: torch.optim.Optimizer, mu: float) -> None:
    """Let every step of ``optimizer`` see μ (w - w_t) on top of the gradient; w_t is what the parameters hold now.

    Args:
        optimizer: the one that takes the step, innermost where optimizers are wrapped.
        mu: μ; 0 leaves the optimizer as it is.
    """
    if mu == 0.0:
        return
    received = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    def pull_back(running: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, start in received.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

    optimizer.register_step_pre_hook(pull_back)
