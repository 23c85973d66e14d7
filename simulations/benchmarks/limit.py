"""The arithmetic limit: how long the products alone would take that a run's training steps cannot do without.

Counted are multiplications and additions (2 m k n of a product [m, k] x [k, n]), for tokens that exist:

- every frozen linear layer, forward, and its input gradient where the layer's input depends on something trained; no
  weight gradient, as the weight is frozen. In the block that is narrowed to one token a row, one token a row.
- attention, by row of l tokens and width w (heads x head size): 4 l l w forward (queries x keys, weights x values) and
  8 l l w backward, from the lowest adapted block on; half of it in causal models; l in place of l l where only one
  token a row is read.

Not counted: LoRA factors, trained heads, embeddings, norms, activations, softmax, the optimizer, averaging, loading,
tokenising, and what a block below the lowest adapter would save in later rounds. So the limit is below what any
implementation can reach. Which layers run, on how many tokens and with which gradients is read off one forward pass.

Operations become seconds with the rate at which this machine does exactly those linear products, measured in turn with
the runs on a batch's number of tokens; attention is charged at the same rate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.models.adapter import AdaptedModel

_PROBE = (5, 3)
"""Tokens of the two rows that are run to see what is computed."""


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer.

    Attributes:
        inputs: k.
        outputs: n.
        every_token: whether it runs on all tokens, or on one a row.
        gradient: whether its input gradient is needed.
    """

    inputs: int
    outputs: int
    every_token: bool
    gradient: bool


@dataclass(frozen=True)
class Attention:
    """A block's attention.

    Attributes:
        width: heads x head size.
        every_token: whether all tokens ask, or one a row.
        gradient: whether it has a backward pass.
        causal: whether a token sees only those before it.
    """

    width: int
    every_token: bool
    gradient: bool
    causal: bool


@dataclass(frozen=True)
class Arithmetic:
    """What a training step computes; see the module's text."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]

    def operations(self, lengths: Sequence[int]) -> float:
        """Operations to run rows of ``lengths`` tokens forward and backward once."""
        tokens, rows, squares = sum(lengths), len(lengths), sum(length * length for length in lengths)
        total = self.linear_operations(tokens, rows)
        for one in self.attentions:
            pairs = (squares / 2 if one.causal else squares) if one.every_token else tokens
            total += (12 if one.gradient else 4) * one.width * pairs
        return float(total)

    def linear_operations(self, tokens: int, rows: int) -> float:
        """The part of the linear layers, for ``rows`` rows of ``tokens`` tokens in all."""
        return float(sum(2 * m * one.inputs * one.outputs * (1 + one.gradient) for m, one in self._sized(tokens, rows)))

    def products(self, tokens: int, rows: int) -> list[tuple[int, int, int]]:
        """The linear layers' products as (m, k, n)."""
        sized = list(self._sized(tokens, rows))
        forward = [(m, one.inputs, one.outputs) for m, one in sized]
        return forward + [(m, one.outputs, one.inputs) for m, one in sized if one.gradient]

    def _sized(self, tokens: int, rows: int) -> Iterator[tuple[int, Linear]]:
        return ((tokens if one.every_token else rows, one) for one in self.linears)


def arithmetic_of(model: AdaptedModel) -> Arithmetic:
    """Read off a forward pass of two rows what a training step of ``model`` computes, with its whole adapter trained.

    Raises:
        ModelError: for a model that computes on padded rows.
    """
    blocks = model.base.family.blocks
    if blocks is None or not model.packs:
        raise ModelError("the model computes on padded rows; expected one that packs them. Choose another base model.")
    model.train_only(frozenset(model.parameters))
    (layers,) = (list(m) for name, m in model.module.named_modules() if f".{name}".endswith(f".{blocks.path}"))
    seen: list[tuple[nn.Linear, int, bool]] = []

    def note(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        (given,) = arguments
        seen.append((layer, given.numel() // given.shape[-1], given.requires_grad))

    with ExitStack() as stack:
        for layer in model.module.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                stack.callback(layer.register_forward_hook(note).remove)
        ids, mask = _probe_rows(model)
        model.logits(ids, mask)
    linears = tuple(
        Linear(layer.in_features, layer.out_features, places == sum(_PROBE), gradient)
        for layer, places, gradient in seen
    )
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    lowest = trained.index(True) if any(trained) else len(trained)
    narrowed = {id(layer) for layer, places, _ in seen if places == len(_PROBE)}
    settings: Any = model.module.config
    size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    attentions = tuple(
        Attention(
            settings.num_attention_heads * size,
            not any(id(part) in narrowed for part in layer.modules()),
            number >= lowest,
            model.base.family.is_decoder,
        )
        for number, layer in enumerate(layers)
    )
    return Arithmetic(linears, attentions)


def matrix_rate(
    arithmetic: Arithmetic, tokens: int, rows: int, device: torch.device, dtype: torch.dtype, least_s: float = 0.5
) -> float:
    """Return operations a second of the linear layers' products: CPU seconds on a CPU, else wall seconds.

    Args:
        arithmetic: which products.
        tokens: N, tokens of a batch.
        rows: B, rows of a batch.
        device: to measure.
        dtype: of the operands.
        least_s: seconds to go on for at least.
    """
    shapes = arithmetic.products(tokens, rows)
    operands = {
        (m, k, n): (torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype).t())
        for m, k, n in set(shapes)
    }

    def once() -> None:
        for shape in shapes:
            torch.mm(*operands[shape])

    once()
    done, began = 0, now(device)
    while (took := now(device) - began) < least_s:
        once()
        done += 1
    return done * arithmetic.linear_operations(tokens, rows) / took


def now(device: torch.device) -> float:
    """A clock: CPU seconds of this process for a CPU; wall seconds, once all is computed, elsewhere."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _probe_rows(model: AdaptedModel) -> tuple[Tensor, Tensor]:
    pad, longest = model.base.tokenizer.pad_token_id, max(_PROBE)
    mask = torch.tensor([[int(place < length) for place in range(longest)] for length in _PROBE])
    if model.base.family.padding_side == "left":
        mask = mask.flip(1)
    token = 1 if pad == 0 else 0
    ids = torch.where(mask.bool(), torch.tensor(token), torch.tensor(pad))
    return ids.to(model.device), mask.to(model.device)
