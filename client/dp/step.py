"""The DP-SGD step: per-unit gradients, clipped, summed, noised, divided by the expected batch size.

Per-example gradients are captured in the trained layers. Opacus' hooks are the reference, and compute them where a kind
of layer is trained that is not captured, on padded rows, as they need; what neither does rightly is refused by name.
One logical Poisson batch is computed in micro-batches, whose clipped gradients add up exactly; then one step with an
empty micro-batch adds the noise. So a batch without records takes the same path: noise alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.dp.capture import Capture, Layers, NotCapturableError, capturable_layers, captured_gradients
from client.dp.clipping import (
    MovingClip,
    ReleasedLoss,
    clip_factors,
    joint_norm,
    layer_groups,
    unit_norms,
    weighted_sum,
)
from client.dp.persons import PersonSums
from client.dp.rounding import rounding_margin
from common.errors import PrivacyError
from common.models.packing import padded
from common.privacy.planning import Mechanism
from common.randomness import CryptoStream

logger = logging.getLogger(__name__)


class _NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with clipping by groups, sums in float64 and noise from a cryptographic stream."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, groups: list[list[int]], clip: MovingClip, stream: CryptoStream,
        margin: float, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, max_grad_norm=clip.value, loss_reduction="mean", **settings)
        self._groups, self._clip, self._stream, self._margin = groups, clip, stream, margin

    def clip_and_accumulate(self) -> None:
        """Add each unit's clipped gradient to ``summed_grad``.

        The L groups of a unit are clipped to C / √L each, less the margin for rounding.
        """
        gradients = self.grad_samples
        bound = self._clip.value / (1.0 + self._margin) / len(self._groups) ** 0.5
        parts = unit_norms(gradients)
        for group in self._groups:
            norms = joint_norm([parts[position] for position in group])
            self._clip.observe(norms)
            factors = clip_factors(norms, bound)
            for position in group:
                parameter, total = self.params[position], weighted_sum(gradients[position], factors)
                parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total

    def add_noise(self) -> None:
        """Put the clipped sum plus noise of standard deviation σ C into ``grad``.

        All of a step's noise is one draw, since a draw for each small matrix costs more to start than to make.
        """
        totals = [parameter.summed_grad for parameter in self.params]
        noise = self._stream.normal((sum(total.numel() for total in totals),))
        noise *= self.noise_multiplier * self._clip.value
        parts = torch.split(noise, [total.numel() for total in totals])
        for parameter, total, part in zip(self.params, totals, parts, strict=True):
            own = part.view_as(total).to(total.dtype).to(total.device)
            parameter.grad = (total + own).to(parameter.dtype).view_as(parameter)


class DpStep:
    """Accumulates clipped gradients and applies noisy steps (Abadi et al. 1607.00133, algorithm 1).

    A context manager: the hooks are on the model between enter and exit, and nowhere else.

    Args:
        module: the model; exactly ``parameters`` take gradients.
        parameters: the trained parameters by name.
        optimizer: the optimizer that gets the noisy gradient.
        mechanism: clip norm, noise multiplier, expected batch size, unit.
        noise: stream that the noise is drawn from.
        batch_first: whether activations are [B, ...].
        capture: how per-example gradients are found.
        clip: the clip norm, for adaptive clipping; the mechanism's own, unmoving, if not given.
        loss: what is released of the loss; withheld if not given.

    Raises:
        PrivacyError: for layers whose per-example gradients Opacus cannot compute.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        noise: CryptoStream,
        batch_first: bool,
        capture: Capture = "layers",
        clip: MovingClip | None = None,
        loss: ReleasedLoss | None = None,
    ) -> None:
        if not batch_first:
            raise PrivacyError(
                "this model family computes with time before batch, where per-example gradients of its layers "
                "would be wrong; expected another base model, or privacy.unit 'none'."
            )
        self._module = module
        self._parameters = dict(parameters)
        self._capture = capture
        self._layers = _captured(module, parameters) if capture == "layers" else None
        self._open = ExitStack()
        self._persons = PersonSums() if mechanism.unit == "user" else None
        self._clip = MovingClip(mechanism, quantile=0.5, lr=0.0) if clip is None else clip
        self._loss = ReleasedLoss(mechanism, bound=1.0) if loss is None else loss
        self._stream = noise
        names = list(self._parameters)
        self._optimizer = _NoisyOptimizer(
            optimizer,
            layer_groups(names) if mechanism.clipping == "per_layer" else [list(range(len(names)))],
            self._clip,
            noise,
            rounding_margin(module, mechanism.expected_batch_size),
            noise_multiplier=mechanism.gradient_noise,
            expected_batch_size=mechanism.expected_batch_size,
        )

    def __enter__(self) -> DpStep:
        if self._capture == "outside":
            return self
        if self._layers is not None:
            self._open.enter_context(captured_gradients(self._layers))
            return self
        try:
            hooks = GradSampleHooks(self._module, batch_first=True, loss_reduction="sum")
        except NotImplementedError as error:  # Opacus' word for a layer that it has no rule for
            raise PrivacyError(
                f"per-example gradients cannot be computed ({str(error)[:120]}); expected trainable linear layers."
            ) from None
        self._open.callback(hooks.cleanup)
        self._open.enter_context(padded())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.__dict__.pop("grad_sample", None)
            parameter.__dict__.pop("summed_grad", None)

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Add the clipped gradients of ``losses`` [b] to the sum.

        Args:
            losses: one a row.
            rows: of the whole step; not used.
            persons: of each row, for unit "user": equal ones adjacent, also across micro-batches.

        Raises:
            PrivacyError: if a trained parameter has no gradient for each of the b rows.
        """
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self.collect(losses, persons)

    def share(self, rows: int) -> float:
        """Return 1: each example's gradient is that of its own loss."""
        return 1.0

    def collect(self, losses: Tensor, persons: Sequence[int] | None = None) -> None:
        """Add the clipped gradients that a backward pass of the summed ``losses`` [b] has left; see ``micro_batch``."""
        for name, parameter in self._parameters.items():
            found = getattr(parameter, "grad_sample", None)
            if not isinstance(found, Tensor) or len(found) != len(losses):
                raise PrivacyError(
                    f"no per-example gradient for {name}; expected one for each record. Nothing was released."
                )
        if self._persons is None:
            self._loss.observe(losses)
        elif persons is None or len(persons) != len(losses):
            raise PrivacyError("rows came without their persons under unit 'user'; expected one a row.")
        else:
            gradients = [parameter.grad_sample for parameter in self._parameters.values()]  # type: ignore[attr-defined]
            self._set(*self._persons.fold(gradients, losses, persons))
        self._advance(last=False)

    def _set(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        self._loss.observe(losses)
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad_sample = gradient  # type: ignore[attr-defined]

    def apply(self, rows: int) -> None:
        """Add noise to the sum, divide by the expected batch size and step; also for a batch without records."""
        held = self._persons.flush() if self._persons is not None else None
        if held is not None:
            self._set(*held)
            self._advance(last=False)
        for parameter in self._parameters.values():
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        self._advance(last=True)
        self._loss.end_step(self._stream)
        self._clip.move(self._stream)

    def _advance(self, *, last: bool) -> None:
        self._optimizer.signal_skip_step(do_skip=not last)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _captured(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Layers | None:
    """Return the layers to capture, or None where Opacus' hooks have to serve."""
    try:
        return capturable_layers(module, parameters)
    except NotCapturableError as error:
        if not error.known_to_opacus:
            raise
        logger.info("%s Opacus' hooks take over.", error)
        return None
