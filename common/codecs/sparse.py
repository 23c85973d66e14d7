"""Top-k: the largest entries of a tensor and where they stand; the rest is zero for whoever receives it.

Of a tensor with n entries ⌈share n⌉ travel, so that both sides know the number (Stich et al. 1809.07599; what is left
out is added to the next update, see :mod:`client.feedback`). Places are ascending, in 16 bits where they fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_kept(count: int, share: float) -> int:
    """Return how many of ``count`` entries travel: one at least of any."""
    return min(count, max(1, math.ceil(share * count))) if count else 0


def place_dtype(count: int) -> torch.dtype:
    """Return what places among ``count`` entries travel as."""
    return torch.uint16 if count <= 2**16 else torch.uint32


def largest_places(values: Tensor, kept: int) -> Tensor:
    """Return the places of the ``kept`` entries of largest magnitude, ascending, int64; of equal ones the first.

    An entry that is no number counts as the largest.
    """
    order = torch.sort(values.abs(), descending=True, stable=True).indices
    return order[:kept].sort().values


def spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Return float32 [count] with ``values`` at ``places`` and zeros elsewhere."""
    whole = torch.zeros(count)
    whole[places] = values
    return whole


def are_places(places: Tensor, count: int) -> bool:
    """Whether int64 places are ascending, each once, and below ``count``."""
    return len(places) == 0 or (int(places[-1]) < count and bool((places[1:] > places[:-1]).all()))
