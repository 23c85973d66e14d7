"""The DP-SGD step: per-example gradients, clipped, summed, noised, divided by the expected batch size.

Per-example gradients are captured in the trainable linear layers, or, where another kind of layer is trained, computed
by Opacus' hooks; Opacus' optimizer clips and scales, and the noise comes from a cryptographic stream. One logical
Poisson batch is computed in micro-batches, whose clipped gradients add up exactly; then one step with an empty
micro-batch adds the noise. So a batch without records takes the same path: noise alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from client.dp.capture import captured_gradients, trainable_linears
from common.errors import PrivacyError
from common.privacy.planning import Mechanism
from common.randomness import CryptoStream


class _NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with noise from a cryptographic stream instead of torch's generator."""

    def __init__(self, optimizer: torch.optim.Optimizer, stream: CryptoStream, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._stream = stream

    def add_noise(self) -> None:
        """Put the clipped sum plus noise of standard deviation σ C into ``grad``."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad
            _check_processed_flag(total)
            noise = self._stream.normal(total.shape) * deviation
            parameter.grad = (total + noise.to(total.dtype).to(total.device)).view_as(parameter)
            _mark_as_processed(total)


class DpStep:
    """Accumulates clipped per-example gradients and applies noisy steps (Abadi et al. 1607.00133, algorithm 1).

    A context manager: the hooks are on the model between enter and exit, and nowhere else.

    Args:
        module: the model; exactly ``parameters`` take gradients.
        parameters: the trained parameters by name.
        optimizer: the optimizer that gets the noisy gradient.
        mechanism: clip norm, noise multiplier, expected batch size.
        noise: stream that the noise is drawn from.
        batch_first: whether activations are [B, ...].
        capture: whether linear layers are captured; False takes Opacus' hooks, the reference.

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
        capture: bool = True,
    ) -> None:
        if not batch_first:
            raise PrivacyError(
                "this model family computes with time before batch, where per-example gradients of its layers "
                "would be wrong; expected another base model, or privacy.unit 'none'."
            )
        self._module = module
        self._parameters = dict(parameters)
        self._layers = trainable_linears(module, parameters) if capture else None
        self._open = ExitStack()
        self._optimizer = _NoisyOptimizer(
            optimizer,
            noise,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=mechanism.expected_batch_size,
            loss_reduction="mean",
        )

    def __enter__(self) -> DpStep:
        if self._layers is not None:
            self._open.enter_context(captured_gradients(self._layers))
            return self
        try:
            hooks = GradSampleHooks(self._module, batch_first=True, loss_reduction="sum")
        except NotImplementedError as error:
            raise PrivacyError(
                f"per-example gradients cannot be computed ({str(error)[:120]}); expected trainable linear layers."
            ) from None
        self._open.callback(hooks.cleanup)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.__dict__.pop("grad_sample", None)
            parameter.__dict__.pop("summed_grad", None)

    def micro_batch(self, losses: Tensor, rows: int) -> None:
        """Add the clipped per-example gradients of ``losses`` [b] to the sum; ``rows`` is not used.

        Raises:
            PrivacyError: if a trained parameter has no gradient for each of the b examples.
        """
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            found = getattr(parameter, "grad_sample", None)
            if not isinstance(found, Tensor) or len(found) != len(losses):
                raise PrivacyError(
                    f"no per-example gradient for {name}; expected one for each record. Nothing was released."
                )
        self._drop_non_finite(len(losses))
        self._advance(last=False)

    def _drop_non_finite(self, rows: int) -> None:
        """Let an example whose gradient holds NaN or infinity count as zero, which is within the clip norm.

        Clipping would turn it into NaN whatever the noise, and so tell that the example was there.
        """
        gradients = [parameter.grad_sample for parameter in self._parameters.values()]  # type: ignore[attr-defined]
        finite = torch.stack([torch.isfinite(g.reshape(rows, -1)).all(dim=1) for g in gradients]).all(dim=0)
        if not bool(finite.all()):
            for gradient in gradients:
                gradient[~finite] = 0.0

    def apply(self, rows: int) -> None:
        """Add noise to the sum, divide by the expected batch size and step; also for a batch without records."""
        for parameter in self._parameters.values():
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        self._advance(last=True)

    def _advance(self, *, last: bool) -> None:
        self._optimizer.signal_skip_step(do_skip=not last)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
