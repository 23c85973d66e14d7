"""Where the tokens of a batch are once padding is left out: rows one after another, [1, N, d] in place of [B, T, d].

Moving tokens between the two forms selects and never adds, and so do the gradients. :func:`segments` says how the rows
lie in what a layer is given at the moment, for code inside a forward pass that has to tell examples apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

GROUP_PADDING = 256
"""A row joins a group if length times padding stays below: what was fastest on one CPU core (64 tokens, 12 heads)."""

Segments = tuple[int, ...]
"""Tokens of each row in a packed [1, N, d]: row after row, their sum is N."""

_SEGMENTS: ContextVar[Segments | None] = ContextVar("segments", default=None)


def segments() -> Segments | None:
    """Return how the rows lie in the input of the layer that runs now; None where it is [B, ...], a row an example."""
    return _SEGMENTS.get()


def lay(rows: Segments | None) -> None:
    """Say how rows lie from now on, inside a :func:`laid_out`."""
    _SEGMENTS.set(rows)


@contextmanager
def laid_out(rows: Segments | None) -> Iterator[None]:
    """Say for a while how rows lie; see :func:`segments`."""
    token = _SEGMENTS.set(rows)
    try:
        yield
    finally:
        _SEGMENTS.reset(token)


class _Pick(torch.autograd.Function):
    """Rows ``index`` of x [n, ...], each once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (grad,) = outputs
        return grad.new_zeros((ctx.size, *grad.shape[1:])).index_copy_(0, index, grad), None


class _Put(torch.autograd.Function):
    """x [n, ...] at the rows ``index`` of [size, ...], zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros((size, *x.shape[1:])).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return outputs[0].index_select(0, index), None, None


class _Repeat(torch.autograd.Function):
    """Rows ``index`` of x [n, ...], where repeated ones get no gradient; ``back`` is where each row is first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return outputs[0].index_select(0, back), None, None


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``index`` of x [n, ...], no row twice."""
    picked: Tensor = _Pick.apply(x, index)  # type: ignore[no-untyped-call]
    return picked


def put(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Return [size, ...] with x [n, ...] at the rows ``index`` and zero elsewhere."""
    placed: Tensor = _Put.apply(x, index, size)  # type: ignore[no-untyped-call]
    return placed


@dataclass(frozen=True)
class Group:
    """Rows of similar length, which attention computes together; their n tokens lie together.

    Attributes:
        lengths: tokens of each row, the longest first.
        index: the token of [n] at each place of [b L]; padding repeats the row's last token.
        back: the place in [b L] of each token of [n].
        exists: [b, 1, 1, L] bool, where there is a token. These three are None where all rows are equally long.
    """

    lengths: Segments
    index: Tensor | None = None
    back: Tensor | None = None
    exists: Tensor | None = None

    def pad(self, x: Tensor) -> Tensor:
        """Return x [n, ...] as [b, L, ...]; what is at the padding must not be read, and takes no gradient."""
        if self.index is not None:
            x = _Repeat.apply(x, self.index, self.back)  # type: ignore[no-untyped-call]
        return x.view(len(self.lengths), self.lengths[0], *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """Return x [b, L, ...] as [n, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.back is None else pick(flat, self.back)


def _group(lengths: list[int], device: torch.device) -> Group:
    longest = lengths[0]
    if lengths[-1] == longest:
        return Group(tuple(lengths))
    counts = torch.tensor(lengths)
    places = torch.arange(longest)
    exists = places < counts[:, None]
    index = (counts.cumsum(0) - counts)[:, None] + torch.minimum(places, counts[:, None] - 1)
    back = exists.flatten().nonzero().squeeze(1)
    return Group(tuple(lengths), index.flatten().to(device), back.to(device), exists[:, None, None].to(device))


class Layout:
    """The tokens that exist in padded rows.

    Args:
        mask: [B, T], not zero where there is a token.
        columns: int64 [B], for a model that reads one place a row in the end: its column in [B, T].

    Attributes:
        shape: B and T.
        lengths: tokens of each row; N is their sum.
        tokens: int64 [N], the place of each token in [B T], row after row.
        read: int64 [B], the token of [N] that is read of each row; None where all are.
        behind: tokens of each row before the one that is read.
        complete: whether every row has a token, and a token where it is read.
    """

    def __init__(self, mask: Tensor, columns: Tensor | None = None) -> None:
        self.shape = (mask.shape[0], mask.shape[1])
        exists = mask.ne(0)
        counts = exists.sum(dim=1)
        self.tokens = exists.flatten().nonzero().squeeze(1)
        self.read: Tensor | None = None
        self.behind: Segments = ()
        if columns is None:
            self.lengths: Segments = tuple(counts.tolist())
            self.complete = min(self.lengths) > 0
            return
        there = exists.gather(1, columns[:, None]).squeeze(1)
        rank = exists.cumsum(dim=1).gather(1, columns[:, None]).squeeze(1) - 1
        self.read = counts.cumsum(0) - counts + rank
        lengths, behind, found = torch.stack([counts, rank, there]).tolist()
        self.lengths, self.behind, self.complete = tuple(lengths), tuple(behind), all(found)

    def pack(self, padded: Tensor) -> Tensor:
        """Return [B, T, ...] as [1, N, ...]."""
        return pick(padded.flatten(0, 1), self.tokens).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return [1, N, ...] as [B, T, ...], zero at the padding."""
        rows, tokens = self.shape
        return put(packed.squeeze(0), self.tokens, rows * tokens).view(rows, tokens, *packed.shape[2:])

    @cached_property
    def order(self) -> list[int]:
        """The rows, the longest first."""
        return sorted(range(len(self.lengths)), key=lambda row: (-self.lengths[row], row))

    @cached_property
    def sorted(self) -> tuple[Tensor, Tensor] | None:
        """Int64 [N] twice: the tokens with the longest rows first, and the way back. None if they lie so already."""
        if self.order == list(range(len(self.lengths))):
            return None
        places = torch.split(torch.arange(len(self.tokens)), list(self.lengths))
        there = torch.cat([places[row] for row in self.order])
        back = torch.empty_like(there).index_copy_(0, there, torch.arange(len(there)))
        return there.to(self.tokens.device), back.to(self.tokens.device)

    @cached_property
    def groups(self) -> list[Group]:
        """All rows, the longest first, in groups that leave little padding."""
        cut: list[list[int]] = []
        for length in (self.lengths[row] for row in self.order):
            if cut and cut[-1][0] * (cut[-1][0] - length) <= GROUP_PADDING:
                cut[-1].append(length)
            else:
                cut.append([length])
        return [_group(lengths, self.tokens.device) for lengths in cut]
