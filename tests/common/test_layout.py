"""Packed and padded forms of a batch hold the same tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.models.layout import GROUP_PADDING, Layout, laid_out, lay, pick, put, segments

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def mask_of(lengths: list[int], *, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    rows = [torch.ones(length, dtype=torch.int64) for length in lengths]
    return pad_sequence(rows, batch_first=True, padding_side=side)


@given(LENGTHS, st.booleans())
@settings(deadline=None, max_examples=40)
def test_unpacking_what_was_packed_gives_the_tokens_and_zeros(lengths: list[int], left: bool) -> None:
    mask = mask_of(lengths, left=left)
    layout = Layout(mask)
    padded = torch.randn(*mask.shape, 3)
    packed = layout.pack(padded)
    assert packed.shape == (1, sum(lengths), 3)
    assert layout.lengths == tuple(lengths)
    assert torch.equal(torch.cat([row[kept.bool()] for row, kept in zip(padded, mask, strict=True)]), packed[0])
    assert torch.equal(layout.unpack(packed), padded * mask[..., None])
    assert torch.equal(layout.pack(layout.unpack(packed)), packed)


@given(LENGTHS)
@settings(deadline=None, max_examples=40)
def test_groups_hold_every_row_and_padding_is_not_read_back(lengths: list[int]) -> None:
    layout = Layout(mask_of(lengths))
    x = torch.randn(sum(lengths), 2, requires_grad=True)
    ordered = x if layout.sorted is None else pick(x, layout.sorted[0])
    parts = torch.split(ordered, [sum(group.lengths) for group in layout.groups])
    padded = [group.pad(part) for group, part in zip(layout.groups, parts, strict=True)]
    for group, rows in zip(layout.groups, padded, strict=True):
        assert all(group.lengths[0] * (group.lengths[0] - length) <= GROUP_PADDING for length in group.lengths)
        exists = torch.arange(rows.shape[1]) < torch.tensor(group.lengths)[:, None]
        assert group.exists is None if exists.all() else torch.equal(group.exists[:, 0, 0], exists)
    flat = torch.cat([group.unpad(2.0 * rows) for group, rows in zip(layout.groups, padded, strict=True)])
    back = flat if layout.sorted is None else pick(flat, layout.sorted[1])
    assert torch.equal(back, 2.0 * x)
    weights = torch.randn_like(x)
    back.backward(weights)
    assert torch.equal(x.grad, 2.0 * weights)


def test_moving_tokens_has_the_gradients_of_indexing() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda values: pick(values, index), (x,))
    assert torch.autograd.gradcheck(lambda values: put(values, torch.tensor([6, 0, 3, 1, 2]), 8), (x,))


def test_segments_are_as_before_outside() -> None:
    assert segments() is None
    with laid_out((2, 3)):
        lay((5,))
        assert segments() == (5,)
    assert segments() is None
    with pytest.raises(ValueError, match="inside"), laid_out((1,)):
        raise ValueError("inside")
    assert segments() is None


def test_read_tokens_are_those_in_their_columns() -> None:
    mask = mask_of([3, 1, 4])
    layout = Layout(mask, torch.tensor([2, 0, 1]))
    assert layout.complete
    assert layout.read is not None
    assert layout.read.tolist() == [2, 3, 5]
    assert layout.behind == (2, 0, 1)
    assert not Layout(mask, torch.tensor([2, 1, 1])).complete
    assert not Layout(torch.tensor([[1, 0], [0, 0]])).complete
