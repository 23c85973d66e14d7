"""Local optimizers and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from common.config.training import TrainingConfig
from common.methods import is_head


def make_optimizer(training: TrainingConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return a fresh optimizer: no state outlives a round, so that nothing untold is carried over.

    Parameters keep their order, so that Opacus' optimizer and ours see the same one.
    """
    head_lr = training.lr if training.head_lr is None else training.head_lr
    groups: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        peak = head_lr if is_head(name) else training.lr
        if not groups or groups[-1]["peak"] != peak:
            groups.append({"params": [], "lr": peak, "peak": peak})
        groups[-1]["params"].append(parameter)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]


def lr_factor(training: TrainingConfig, progress: float) -> float:
    """Return the share of the peak learning rate at ``progress`` in [0, 1) of the whole run."""
    if progress < training.warmup:
        return progress / training.warmup
    if training.schedule == "constant":
        return 1.0
    rest = (progress - training.warmup) / (1.0 - training.warmup)
    return 1.0 - rest if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
