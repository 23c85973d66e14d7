"""How the losses of a step become a step of the optimizer, without differential privacy; with it see client.dp.step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class GradientStep(Protocol):
    """Takes the losses of a step's micro-batches, and steps."""

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Take the losses [b] of a micro-batch out of a step of ``rows`` rows: differentiate and collect."""

    def apply(self, rows: int) -> None:
        """Finish a step of ``rows`` rows."""


class JointStep(GradientStep, Protocol):
    """One whose losses may be differentiated together with those of other sites."""

    def share(self, rows: int) -> float:
        """Return what each loss counts in the sum that is differentiated, in a step of ``rows`` rows."""

    def collect(self, losses: Tensor, persons: Sequence[int] | None = None) -> None:
        """Take what a backward pass of that sum has left of the losses [b]."""


@dataclass(frozen=True)
class PlainStep:
    """The mean gradient over the rows of a step, its norm clipped where the config says so."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Add the gradient of the losses' share of the mean."""
        (losses.sum() / rows).backward()  # type: ignore[no-untyped-call]

    def share(self, rows: int) -> float:
        """Return one over the rows: the gradient is that of the mean."""
        return 1.0 / rows

    def collect(self, losses: Tensor, persons: Sequence[int] | None = None) -> None:
        """Do nothing: gradients add up where autograd leaves them."""

    def apply(self, rows: int) -> None:
        """Step on the accumulated gradient."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
