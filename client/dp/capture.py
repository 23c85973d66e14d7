"""Per-example gradients of trainable linear layers, captured where the weight gradient would be computed.

For y = x Wᵀ + b with x [B, ..., n] and ∂L/∂y [B, ..., m], the gradient of example i is Σ_t (∂L/∂y)_it ⊗ x_it: one
batched product. It takes the place of the summed product that autograd would do, so it costs about the same, and no
activation is kept that autograd would not keep. It needs a loss that is a sum over examples, and the batch in the first
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import PrivacyError


class _CapturingLinear(torch.autograd.Function):
    """A linear map whose backward leaves ``grad_sample`` [B, m, n] on its weight and [B, m] on its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = outputs
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        steps = grad.reshape(len(grad), -1, grad.shape[-1])
        if weight.requires_grad:
            inputs = x.reshape(len(x), -1, x.shape[-1])
            _leave(weight, torch.bmm(steps.transpose(1, 2), inputs.to(steps.dtype)))
        if bias is not None and bias.requires_grad:
            _leave(bias, steps.sum(dim=1))
        return (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None, None, None


def _leave(parameter: nn.Parameter, grad_sample: Tensor) -> None:
    """Put per-example gradients on a parameter, adding to those of an earlier use in the same pass."""
    earlier = getattr(parameter, "grad_sample", None)
    found = grad_sample.to(parameter.dtype)
    parameter.grad_sample = found if earlier is None else earlier + found  # type: ignore[attr-defined]


def trainable_linears(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[nn.Linear] | None:
    """Return the linear layers that own exactly ``parameters``, or None where another kind of layer owns one."""
    wanted = {id(parameter) for parameter in parameters.values()}
    layers = [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear and any(id(own) in wanted for own in layer.parameters(recurse=False))
    ]
    owned = {id(own) for layer in layers for own in layer.parameters(recurse=False)}
    return layers if wanted <= owned else None


@contextmanager
def captured_gradients(layers: list[nn.Linear]) -> Iterator[None]:
    """Let ``layers`` leave per-example gradients on their parameters while the context is open.

    Raises:
        PrivacyError: if a layer is being captured already.
    """
    if any("forward" in layer.__dict__ for layer in layers):
        raise PrivacyError("a layer's forward is replaced already; expected none while DP-SGD runs.")
    try:
        for layer in layers:
            layer.forward = _capturing_forward(layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _capturing_forward(layer: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, layer.weight, layer.bias)
        output: Tensor = _CapturingLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return output

    return forward
