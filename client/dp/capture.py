"""Per-example gradients of trainable layers, captured where the weight gradient would be computed.

For a linear layer y = x Wᵀ + b with x [B, ..., n] and ∂L/∂y [B, ..., m], the gradient of example i is
Σ_t (∂L/∂y)_it ⊗ x_it: one batched product. It takes the place of the summed product that autograd would do, so it costs
about the same, and no activation is kept that autograd would not keep. For an embedding it is ∂L/∂y, added up by token
and example. Both need a loss that is a sum over examples, and the batch in the first dimension; or, for a linear layer
in a packed forward pass (:mod:`common.models.packing`), x [1, N, n] whose rows lie as :func:`segments` says.

Products are float32 at least, whatever the base model is held in. A gradient that reaches a trained parameter on a
way other than through a captured layer would be lost, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from common.errors import PrivacyError
from common.models.layout import Segments, segments

LARGEST_EMBEDDING = 1024
"""Most entries of an embedding that is captured: its per-example gradients are dense, [B, entries, d]."""

Capture = Literal["layers", "hooks", "outside"]
"""Who leaves per-example gradients on the parameters: the trained layers, or Opacus' hooks where layers cannot be
captured; Opacus' hooks, the reference; whoever runs the model, for parameters that are not the model's own."""

Layers = Mapping[str, nn.Module]
"""Layers that can be captured, by name."""


class NotCapturableError(PrivacyError):
    """A trained layer is not captured here.

    Args:
        message: which, and why.
        known_to_opacus: whether Opacus' hooks compute its per-example gradients rightly (a test holds them to it).
    """

    def __init__(self, message: str, *, known_to_opacus: bool) -> None:
        super().__init__(message)
        self.known_to_opacus = known_to_opacus


class _CapturingLinear(torch.autograd.Function):
    """A linear map whose backward leaves ``grad_sample`` [B, m, n] on its weight and [B, m] on its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.rows = weight, bias, segments()
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = outputs
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        rows = rows_of(x, ctx.rows)
        steps = _widened(grad.reshape(-1, grad.shape[-1]))
        if weight.requires_grad:
            leave(weight, products(steps, x.reshape(-1, x.shape[-1]).to(steps.dtype), rows))
        if bias is not None and bias.requires_grad:
            leave(bias, torch.stack([own.sum(dim=0) for own in torch.split(steps, rows)]))
        return (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None, None, None


class _CapturingEmbedding(torch.autograd.Function):
    """A lookup of ids [B, ...] whose backward leaves ``grad_sample`` [B, entries, d] on its weight."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx, ctx.rows = weight, padding_idx, segments()
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, None, None]:
        (grad,) = outputs
        (ids,) = ctx.saved_tensors
        if ctx.rows is not None:
            raise PrivacyError("an embedding inside packed blocks is captured; expected none. Nothing was released.")
        rows, (entries, width) = len(ids), ctx.weight.shape
        looked_up = _widened(grad.reshape(-1, width))
        own = torch.arange(rows, device=ids.device).unsqueeze(1) * entries + ids.reshape(rows, -1)
        sums = looked_up.new_zeros(rows * entries, width).index_add_(0, own.flatten(), looked_up)
        grad_sample = sums.view(rows, entries, width)
        if ctx.padding_idx is not None:
            grad_sample[:, ctx.padding_idx] = 0.0
        leave(ctx.weight, grad_sample)
        return None, None, None


def rows_of(x: Tensor, rows: Segments | None) -> list[int]:
    """Return how many places of x [B, ..., n] or [1, N, n], its last dimension aside, belong to each example."""
    places = math.prod(x.shape[1:-1])
    if rows is None:
        return [places] * len(x)
    if len(x) != 1 or sum(rows) != places:
        raise PrivacyError(
            f"a captured layer was given {tuple(x.shape)} in a packed pass of {sum(rows)} tokens; expected those. "
            "Nothing was released."
        )
    return list(rows)


def products(steps: Tensor, inputs: Tensor, rows: list[int]) -> Tensor:
    """Each example's sum over its places: steps [N, m] and inputs [N, n] to [B, m, n].

    Unequal examples are multiplied one by one on a CPU, where that is cheap, and padded with zeros elsewhere.
    """
    if len(set(rows)) == 1:
        shape = (len(rows), rows[0])
        return torch.bmm(steps.reshape(*shape, -1).transpose(1, 2), inputs.reshape(*shape, -1))
    own, seen = list(torch.split(steps, rows)), list(torch.split(inputs, rows))
    if steps.device.type == "cpu":
        return torch.stack([one.t() @ other for one, other in zip(own, seen, strict=True)])
    return torch.bmm(pad_sequence(own, batch_first=True).transpose(1, 2), pad_sequence(seen, batch_first=True))


def _widened(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def leave(parameter: nn.Parameter, grad_sample: Tensor) -> None:
    """Put per-example gradients on a parameter, adding to those of an earlier use in the same pass."""
    earlier = getattr(parameter, "grad_sample", None)
    found = grad_sample.to(parameter.dtype)
    parameter.grad_sample = found if earlier is None else earlier + found  # type: ignore[attr-defined]


def capturable_layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Layers:
    """Return the layers that own ``parameters``, by name.

    Every owner counts: a weight that two layers share gets the sum of what both captured.

    Args:
        module: the model.
        parameters: the trained parameters by name.

    Raises:
        NotCapturableError: naming a trained parameter and an owner of it that cannot be captured.
        PrivacyError: for a parameter that no layer of the model owns.
    """
    trained = {id(parameter): name for name, parameter in parameters.items()}
    layers: dict[str, nn.Module] = {}
    owned: set[int] = set()
    for layer_name, layer in module.named_modules():
        own = [id(parameter) for parameter in layer.parameters(recurse=False) if id(parameter) in trained]
        if own:
            obstacle = _obstacle(layer)
            if obstacle:
                raise NotCapturableError(
                    f"per-example gradients of {trained[own[0]]} cannot be captured in {layer_name or 'the model'} "
                    f"({obstacle}); expected linear layers and embeddings of at most {LARGEST_EMBEDDING} entries.",
                    known_to_opacus=_known_to_opacus(layer) and not _shares_weights(module, trained),
                )
            layers[layer_name] = layer
            owned.update(own)
    homeless = [name for identity, name in trained.items() if identity not in owned]
    if homeless:
        raise PrivacyError(f"no layer of the model owns {homeless[0]}; expected the model's own parameters.")
    return layers


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be captured, or None. Subclasses may compute something else, so types are compared exactly."""
    if type(layer) is nn.Linear:
        return None
    if type(layer) is not nn.Embedding:
        return f"a {type(layer).__name__}"
    if layer.num_embeddings > LARGEST_EMBEDDING:
        return f"an embedding of {layer.num_embeddings} entries"
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        return "an embedding with max_norm or scale_grad_by_freq, which depend on the other examples"
    return None


def _known_to_opacus(layer: nn.Module) -> bool:
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq
    return type(layer) is nn.LayerNorm


def _shares_weights(module: nn.Module, trained: Mapping[int, str]) -> bool:
    owned = [id(p) for layer in module.modules() for p in layer.parameters(recurse=False) if id(p) in trained]
    return len(set(owned)) < len(owned)


@contextmanager
def captured_gradients(layers: Layers) -> Iterator[None]:
    """Let ``layers`` leave per-example gradients on their trained parameters while the context is open.

    Raises:
        PrivacyError: if a layer is being captured already; and, out of a backward pass, if a gradient reaches a trained
            parameter on another way than through its layers' forward.
    """
    if any("forward" in layer.__dict__ for layer in layers.values()):
        raise PrivacyError("a layer's forward is replaced already; expected none while DP-SGD runs.")
    with ExitStack() as open_captures:
        for name, layer in layers.items():
            layer.forward = _capturing_forward(layer)
            open_captures.callback(layer.__dict__.pop, "forward", None)
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    open_captures.enter_context(_no_gradient_elsewhere(name, parameter))
        yield


@contextmanager
def _no_gradient_elsewhere(layer_name: str, parameter: nn.Parameter) -> Iterator[None]:
    """Refuse what autograd itself would add to a captured parameter: it is of the whole batch, not of an example."""

    def refuse(reached: Tensor) -> None:
        if reached.grad is not None:  # autograd calls this for the None of a captured layer as well
            raise PrivacyError(
                f"a gradient reached a parameter of {layer_name} past its forward; expected no other use of it, "
                "such as a tied weight. Nothing was released."
            )

    handle = parameter.register_post_accumulate_grad_hook(refuse)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def _capturing_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nn.Embedding):
        embedding = layer

        def look_up(ids: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return functional.embedding(ids, embedding.weight)
            output: Tensor = _CapturingEmbedding.apply(ids, embedding.weight, embedding.padding_idx)  # type: ignore[no-untyped-call]
            return output

        return look_up

    def multiply(x: Tensor) -> Tensor:
        weight: Any = layer.weight
        bias: Any = layer.bias
        if not torch.is_grad_enabled():
            return functional.linear(x, weight, bias)
        output: Tensor = _CapturingLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return output

    return multiply
