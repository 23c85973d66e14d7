"""Tokenised rows and the batches they are computed in.

A step's rows are sorted by length and cut into micro-batches. The loss is a sum over rows, so this is exact: gradients
are those of the one padded batch. Rows are handed over padded; :mod:`common.models.packing` takes the padding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PACKED_TOKENS = 1024
"""Tokens of a packed micro-batch on a CPU."""

PACKED_ROWS = 64
"""Rows of a packed micro-batch: under DP each has a gradient of its own."""

IGNORED = -100
"""Target of a position that is not learnt."""


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row.

    Attributes:
        input_ids: [T] int64.
        targets: [] int64, the class, or [T] int64, the token to be predicted *at* each position (``IGNORED`` for
            prompt and padding).
    """

    input_ids: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """Padded rows: input_ids and attention_mask [B, T] int64, targets [B] or [B, T] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Collator:
    """Pads rows into batches.

    Attributes:
        pad_id: the padding token.
        padding_side: "right", or "left" for models that summarise the last position.
    """

    pad_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[TokenRow]) -> Batch:
        """Pad ``rows`` to the longest of them."""
        masks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
        tokenwise = rows[0].targets.dim() == 1
        targets = [row.targets for row in rows]
        return Batch(
            input_ids=self._pad([row.input_ids for row in rows], self.pad_id),
            attention_mask=self._pad(masks, 0),
            targets=self._pad(targets, IGNORED) if tokenwise else torch.stack(targets),
        )

    def _pad(self, tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.padding_side)


@dataclass(frozen=True)
class Limit:
    """How much is computed at once.

    Attributes:
        rows: most rows; None for any number.
        tokens: most tokens that exist, save that one row is always taken; None for any number.
    """

    rows: int | None = None
    tokens: int | None = None

    def cut(self, lengths: Sequence[int]) -> list[int]:
        """Return how many of some rows to take at a time, in their order; ``lengths`` are their tokens."""
        counts: list[int] = []
        tokens = 0
        for length in lengths:
            full = not counts or counts[-1] == self.rows
            if full or (self.tokens is not None and tokens + length > self.tokens):
                counts.append(0)
                tokens = 0
            counts[-1] += 1
            tokens += length
        return counts


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], limit: Limit, persons: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut the ``rows`` of a step into micro-batches within ``limit``, sorted by length, longest first.

    Args:
        lengths: tokens of every row of the data.
        rows: indices into ``lengths``.
        limit: how much a micro-batch may hold.
        persons: of every row of the data; where given, rows of one person stay next to each other, and persons are
            sorted by their longest row.

    Returns:
        Lists of indices; together each of ``rows`` once. The longest come first, so that memory peaks at once.
    """
    if persons is None:
        ordered = sorted(rows, key=lambda index: (-lengths[index], index))
    else:
        longest: dict[int, int] = {}
        for row in rows:
            longest[persons[row]] = max(lengths[row], longest.get(persons[row], 0))
        ordered = sorted(rows, key=lambda i: (-longest[persons[i]], persons[i], -lengths[i], i))
    left = iter(ordered)
    return [list(islice(left, count)) for count in limit.cut([lengths[index] for index in ordered])]


def micro_batch_limit(configured: int | str, device: torch.device, *, packed: bool) -> Limit:
    """What is computed at once; "auto" is what was fastest, the same for any number of threads.

    Args:
        configured: ``training.micro_batch_size``.
        device: where it is computed.
        packed: whether the model computes on tokens that exist; else rows are padded, and few of them waste little.
    """
    if isinstance(configured, int):
        return Limit(rows=configured)
    on_cpu = device.type == "cpu"
    if packed:
        return Limit(rows=PACKED_ROWS, tokens=PACKED_TOKENS if on_cpu else 16384)
    return Limit(rows=4 if on_cpu else 32)
