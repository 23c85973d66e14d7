"""Quantisation by block with stochastic rounding: a few bits an entry and one scale a block.

The entries x of a block share the scale s, the largest |x| over L = 2^(bits - 1) - 1, rounded up to bfloat16. An entry
travels as the integer q = floor(x / s + u) in [-L, L], u uniform in [0, 1), and comes back as q s (QSGD, Alistarh et
al. 1610.02132, with the largest entry for the norm; blocks as in Dettmers et al. 2110.02861). Guarantees, of finite
entries up to about 3e38:

- |q s - x| <= s, and E[q s] = x over u;
- s is zero for a block of zeros, else a normal bfloat16; q s is exact in float32;
- a block with an entry that is not finite has the scale NaN, so that whoever receives it sees that.

Four bits are stored as q + 8, two entries a byte, the first in the low half; a last half that is left over holds 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-126
"""Of a block that is not all zeros: the smallest normal bfloat16. Smaller entries round to 0 or to it."""

_OFFSET = 8


def levels(bits: int) -> int:
    """Return L, the largest integer of a code."""
    return int(2 ** (bits - 1) - 1)


def num_blocks(count: int, block: int) -> int:
    """Return the number of blocks of ``count`` entries; the last may be short."""
    return -(-count // block)


def block_scales(values: Tensor, bits: int, block: int) -> Tensor:
    """Return the scale of each block, bfloat16 [⌈n / block⌉].

    Args:
        values: [n], float32.
        bits: of a code.
        block: entries of a block.
    """
    largest = _blocks(values, block).abs().amax(dim=1).double() / levels(bits)
    rounded = largest.clamp(min=SMALLEST_SCALE).to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    scales = torch.where(rounded.double() < largest, above, rounded)
    scales = torch.where(largest == 0, torch.zeros_like(scales), scales)
    fits = torch.isfinite(scales.float() * levels(bits))
    return torch.where(fits, scales, torch.full_like(scales, torch.nan))


def quantise(values: Tensor, scales: Tensor, uniform: Tensor, bits: int, block: int) -> Tensor:
    """Return the codes q, int8 [n].

    Args:
        values: [n], float32.
        scales: of :func:`block_scales`.
        uniform: u of each entry in [0, 1), float64 [n].
        bits: of a code.
        block: entries of a block.
    """
    scale = _of_entries(scales, len(values), block).double()
    usable = (scale > 0) & torch.isfinite(scale)
    codes = torch.floor(values.double() / torch.where(usable, scale, torch.ones_like(scale)) + uniform)
    most = levels(bits)
    return torch.where(usable, codes, torch.zeros_like(codes)).clamp(-most, most).to(torch.int8)


def dequantise(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """Return q s, float32 [n]."""
    return codes.to(torch.float32) * _of_entries(scales, len(codes), block).to(torch.float32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return codes of four bits, int8 [n], two a byte: uint8 [⌈n / 2⌉]."""
    shifted = (codes.to(torch.int16) + _OFFSET).to(torch.uint8)
    if len(shifted) % 2:
        shifted = torch.cat([shifted, shifted.new_full((1,), _OFFSET)])
    return shifted[0::2] | (shifted[1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return the codes of packed bytes, int8 [2 bytes]: one more than were packed where their number was odd."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return (halves.to(torch.int16) - _OFFSET).to(torch.int8)


def error_bound(values: Tensor, bits: int, block: int) -> Tensor:
    """Return the largest error of each entry, which is its block's scale: float32 [n]."""
    return _of_entries(block_scales(values, bits, block), len(values), block).float()


def _blocks(values: Tensor, block: int) -> Tensor:
    """[⌈n / block⌉, block], filled up with zeros."""
    count = num_blocks(len(values), block)
    return torch.nn.functional.pad(values, (0, count * block - len(values))).view(count, block)


def _of_entries(scales: Tensor, count: int, block: int) -> Tensor:
    return scales.repeat_interleave(block)[:count]
