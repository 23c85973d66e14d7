"""Attention on packed rows: padding is put in here, and nowhere else in a block.

Registered with transformers under :data:`PACKED`, so that its own model code calls it. Outside of a packed forward pass
it is transformers' scaled dot-product attention. The kernels are PyTorch's: rows are computed in groups of similar
length, [b, H, L, D], where a causal mask needs no padding mask, as padding stands behind what a token sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from common.models.layout import Group, Layout, pick

PACKED = "fedtune_packed"
"""Name of the attention implementation."""

_FUNCTIONS: Any = transformers.AttentionInterface()  # type: ignore[no-untyped-call]
_MASKS: Any = transformers.AttentionMaskInterface()  # type: ignore[no-untyped-call]
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def attending(layout: Layout) -> Iterator[None]:
    """Let attention take packed rows for a while."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def _mask(*arguments: Any, **settings: Any) -> Any:
    """The mask that a model hands to its blocks: none for packed rows, whose masks are made where they are padded."""
    if _LAYOUT.get() is not None:
        return None
    return _MASKS["sdpa"](*arguments, **settings)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of one block: [1, H, N, D] of packed rows to [1, N, H, D], with fewer heads in key and value or not."""
    layout = _LAYOUT.get()
    if layout is None:
        found: tuple[Tensor, None] = _FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **settings)
        return found
    parts = [_by_group(x.squeeze(0).transpose(0, 1), layout) for x in (query, key, value)]
    window = settings.get("sliding_window")
    outputs = [
        _attend(group, *part, causal=bool(module.is_causal), window=window, scale=settings.get("scaling"))
        for group, *part in zip(layout.groups, *parts, strict=True)
    ]
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if layout.sorted is not None:
        joined = pick(joined, layout.sorted[1])
    return joined.unsqueeze(0), None


def _by_group(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Cut x [N, H, D] into what belongs to each group, [n, H, D]."""
    if layout.sorted is not None:
        x = pick(x, layout.sorted[0])
    return torch.split(x, [sum(group.lengths) for group in layout.groups])


def _attend(
    group: Group, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    """Attention within each row of a group: [n, H, D] to [n, H, D]."""
    longest = group.lengths[0]
    mask = None if causal else group.exists
    if causal and window is not None and longest > window:
        places = torch.arange(longest, device=query.device)
        behind = places[:, None] - places
        mask, causal = (behind >= 0) & (behind < window), False
    rows = [group.pad(x).transpose(1, 2) for x in (query, key, value)]
    output = functional.scaled_dot_product_attention(
        rows[0],
        rows[1],
        rows[2],
        attn_mask=mask,
        is_causal=causal and longest > 1,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return group.unpad(output.transpose(1, 2))


def register() -> None:
    """Make the implementation known to transformers under :data:`PACKED`; again does no harm."""
    _FUNCTIONS.register(PACKED, _attention)
    _MASKS.register(PACKED, _mask)
