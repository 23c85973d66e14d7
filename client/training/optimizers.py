"""Local optimizers and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from common.config.training import TrainingConfig


def make_optimizer(training: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a fresh optimizer: no state outlives a round, so that nothing untold is carried over."""
    chosen = list(parameters)
    if training.optimizer == "sgd":
        return torch.optim.SGD(chosen, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(chosen, lr=training.lr, weight_decay=training.weight_decay)


def lr_factor(training: TrainingConfig, progress: float) -> float:
    """Return the share of the peak learning rate at ``progress`` in [0, 1) of the whole run."""
    if progress < training.warmup:
        return progress / training.warmup
    if training.schedule == "constant":
        return 1.0
    rest = (progress - training.warmup) / (1.0 - training.warmup)
    return 1.0 - rest if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
