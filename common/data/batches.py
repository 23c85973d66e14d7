"""Tokenised rows and the batches they are computed in.

A step's rows are sorted by length and cut into micro-batches, each padded to its own longest row. The loss is a sum
over rows, so this is exact: gradients are those of the one padded batch, and most padding is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], size: int, persons: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut the ``rows`` of a step into micro-batches of at most ``size``, sorted by length, longest first.

    Args:
        lengths: tokens of every row of the data.
        rows: indices into ``lengths``.
        size: most rows in a micro-batch.
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
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def micro_batch_size(configured: int | str, device: torch.device) -> int:
    """Rows in a micro-batch; "auto" is what was fastest: 4 a thread on a CPU, 32 on an accelerator."""
    if isinstance(configured, int):
        return configured
    return 4 * torch.get_num_threads() if device.type == "cpu" else 32
