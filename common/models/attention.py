"""Attention on packed rows: padding is put in here, and nowhere else in a block.

Registered with transformers under :data:`PACKED`, so that its own model code calls it. Outside of a packed forward pass
it is transformers' scaled dot-product attention. The kernels are PyTorch's: rows are computed in groups of similar
length, [b, H, L, D], where a causal mask needs no padding mask, as padding stands behind what a token sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from common.models.layout import Layout, pick, put

PACKED = "fedtune_packed"
"""Name of the attention implementation."""

_FUNCTIONS: Any = transformers.AttentionInterface()  # type: ignore[no-untyped-call]
_MASKS: Any = transformers.AttentionMaskInterface()  # type: ignore[no-untyped-call]
_RUNNING: ContextVar[Packed | None] = ContextVar("running", default=None)


@dataclass
class Packed:
    """A packed forward pass that is going on.

    Attributes:
        layout: how its tokens lie.
        single: int64 [B], the token of [N] of each row that the block which runs now is needed for; None if all are.
    """

    layout: Layout
    single: Tensor | None = None


@contextmanager
def attending(packed: Packed) -> Iterator[None]:
    """Let attention take packed rows for a while."""
    token = _RUNNING.set(packed)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def _mask(*arguments: Any, **settings: Any) -> Any:
    """The mask that a model hands to its blocks: none for packed rows, whose masks are made where they are padded."""
    if _RUNNING.get() is not None:
        return None
    return _MASKS["sdpa"](*arguments, **settings)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of one block: [1, H, N, D] of packed rows to [1, N, H, D], with fewer heads in key and value or not."""
    running = _RUNNING.get()
    if running is None:
        found: tuple[Tensor, None] = _FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **settings)
        return found
    rule = _Rule(bool(module.is_causal), settings.get("sliding_window"), settings.get("scaling"))
    states = States(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)))
    if running.single is None:
        return _attend_all(states, running.layout, rule).unsqueeze(0), None
    return _attend_once(states, running.layout, rule, running.single).unsqueeze(0), None


class States(NamedTuple):
    """Queries, keys and values, each [N, H, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class _Rule:
    """What a token sees: causal, those up to itself; window, of those the last so many; scale is of the products."""

    causal: bool
    window: int | None
    scale: float | None

    def seen(self, places: Tensor, own: Tensor) -> Tensor:
        """Which of ``places`` [..., L] a causal token at ``own`` [..., 1] sees."""
        seen = places <= own
        return seen if self.window is None else seen & (places > own - self.window)


def _attend_all(states: States, layout: Layout, rule: _Rule) -> Tensor:
    """Attention of every token: [N, H, D]."""
    outputs = []
    parts = [_by_group(x, layout) for x in states]
    for group, *own in zip(layout.groups, *parts, strict=True):
        longest = group.lengths[0]
        mask, causal = (None, longest > 1) if rule.causal else (group.exists, False)
        if causal and rule.window is not None and longest > rule.window:
            places = torch.arange(longest, device=states.query.device)
            mask, causal = rule.seen(places, places[:, None]), False
        rows = [group.pad(x) for x in own]
        outputs.append(group.unpad(_product(rows[0], rows[1], rows[2], mask, rule.scale, causal=causal)))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined if layout.sorted is None else pick(joined, layout.sorted[1])


def _attend_once(states: States, layout: Layout, rule: _Rule, single: Tensor) -> Tensor:
    """Attention of the token ``single`` of each row, zero at the others: [N, H, D]."""
    query, key, value = states
    read = single[torch.tensor(layout.order, device=query.device)]
    behind = torch.tensor([layout.behind[row] for row in layout.order], device=query.device)
    sizes = [len(group.lengths) for group in layout.groups]
    queries, places = torch.split(pick(query, read), sizes), torch.split(behind, sizes)
    outputs = []
    keys, values = _by_group(key, layout), _by_group(value, layout)
    for group, own, place, *seen in zip(layout.groups, queries, places, keys, values, strict=True):
        mask = group.exists
        if rule.causal:
            mask = rule.seen(torch.arange(group.lengths[0], device=query.device), place[:, None])[:, None, None]
        rows = [group.pad(x) for x in seen]
        outputs.append(_product(own.unsqueeze(1), rows[0], rows[1], mask, rule.scale, causal=False).squeeze(1))
    return put(torch.cat(outputs), read, len(query))


def _by_group(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Cut x [N, H, D] into what belongs to each group, [n, H, D]."""
    if layout.sorted is not None:
        x = pick(x, layout.sorted[0])
    return torch.split(x, [sum(group.lengths) for group in layout.groups])


def _product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, *, causal: bool
) -> Tensor:
    """PyTorch's attention on padded rows: query [b, Q, H, D], key and value [b, L, H, D] to [b, Q, H, D]."""
    output = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return output.transpose(1, 2)


def register() -> None:
    """Make the implementation known to transformers under :data:`PACKED`; again does no harm."""
    _FUNCTIONS.register(PACKED, _attention)
    _MASKS.register(PACKED, _mask)
