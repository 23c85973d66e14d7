"""Opacus' ghost clipping, for comparison only: norms without per-example gradients, at the price of a second backward.

Per-example norms come from activations and output gradients (Li et al. 2110.05679, section 4); a second backward pass
of the reweighted loss gives the clipped sum. The noise is torch's, which no site may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from common.models.packing import padded
from common.privacy.planning import Mechanism


class GhostStep:
    """DP-SGD steps by ghost clipping with one clip norm; a step is one micro-batch.

    A context manager: the hooks are on the model between enter and exit.

    Args:
        module: the model; what takes gradients is trained.
        optimizer: gets the noisy gradient.
        mechanism: clip norm, noise multiplier, expected batch size.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> None:
        self._hooks = GradSampleModuleFastGradientClipping(
            module, batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=mechanism.clip_norm,
            use_ghost_clipping=True,
        )  # fmt: skip
        self._open = ExitStack()
        self._optimizer = DPOptimizerFastGradientClipping(
            optimizer, noise_multiplier=mechanism.noise_multiplier, max_grad_norm=mechanism.clip_norm,
            expected_batch_size=mechanism.expected_batch_size, loss_reduction="mean",
        )  # fmt: skip

    def __enter__(self) -> GhostStep:
        self._open.enter_context(padded())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._hooks.to_standard_module()

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Leave the clipped sum of the gradients of ``losses`` [b] in ``grad``; nothing else is used."""
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)
        self._hooks.disable_hooks()
        (self._hooks.get_clipping_coef().detach() * losses).sum().backward()
        self._hooks.enable_hooks()

    def apply(self, rows: int) -> None:
        """Add noise, divide by the expected batch size and step."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
