"""Narrowing: the last block of a classifier computes for the one token a row that is read, save keys and values.

BERT's family reads the first token, decoders the last. Layers of the block that work token by token are given
[1, B, d] in place of [1, N, d]; nothing downstream or in the gradients differs, as the other tokens are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.models.attention import Packed
from common.models.layout import lay, pick, put

Columns = Callable[[Tensor], Tensor]
"""From input_ids [B, T] to the column that is read of each row, int64 [B]."""


def first_column(input_ids: Tensor) -> Tensor:
    """The column that encoders' classifiers read."""
    return input_ids.new_zeros(len(input_ids))


def last_column(pad_id: int) -> Columns:
    """Return the rule of transformers' decoders: the rightmost token that is not ``pad_id``, or the first."""

    def last(input_ids: Tensor) -> Tensor:
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (columns * input_ids.ne(pad_id)).argmax(dim=1)

    return last


class Narrow:
    """Hooks that narrow the last block in one forward pass.

    Args:
        packed: the pass.
        read: int64 [B], the token that is read of each row, in [N].
    """

    def __init__(self, packed: Packed, read: Tensor) -> None:
        self._packed, self._layout, self._read = packed, packed.layout, read
        self._for_good = False

    def begin(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Enter the block."""
        self._packed.single = self._read

    def cut(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a layer the tokens that are read: [1, N, d] to [1, B, d]."""
        lay((1,) * len(self._read))
        return tuple(pick(x.squeeze(0), self._read).unsqueeze(0) for x in arguments)

    def fill(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Put zeros at the others in what it returns: [1, B, d] to [1, N, d]."""
        lay(self._layout.lengths)
        return put(output.squeeze(0), self._read, len(self._layout.tokens)).unsqueeze(0)

    def cut_for_good(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """As :meth:`cut`; the rest of the block goes on with [1, B, d]."""
        self._for_good = True
        return self.cut(layer, arguments)

    def end(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Leave the block: [1, N, d] or [1, B, d] to [B, T, d], zero at what is not read."""
        lay(None)
        self._packed.single = None
        if not self._for_good:
            output = pick(output.squeeze(0), self._read).unsqueeze(0)
        rows, tokens = self._layout.shape
        places = self._layout.tokens[self._read]
        return put(output.squeeze(0), places, rows * tokens).view(rows, tokens, *output.shape[2:])
