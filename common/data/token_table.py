"""Tokenised rows in flat arrays, and the lazy sequences of rows that stand on them.

A row is a slice: no tensor exists before it is asked for, so that thousands of sites cost what their tokens cost on
disk, and only those pages are in memory that are being read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from common.data.batches import TokenRow
from common.data.dealing import Columns


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The rows of a data part, in the order of the file. Arrays may be memory-mapped.

    Attributes:
        input_ids: [sum of T] int32.
        offsets: [N + 1] int64, where each row begins.
        targets: [N] int32 for classes, else [sum of T] int32.
        tokenwise: whether targets are one a token.
        columns: what else is known of the rows.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int32]
    tokenwise: bool
    columns: Columns

    def row(self, number: int) -> TokenRow:
        """Return one row as int64 tensors of its own."""
        tokens = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        ids = torch.from_numpy(self.input_ids[tokens].astype(np.int64))
        if self.tokenwise:
            return TokenRow(ids, torch.from_numpy(self.targets[tokens].astype(np.int64)))
        return TokenRow(ids, torch.tensor(int(self.targets[number])))


class TokenRows(Sequence[TokenRow]):
    """Some rows of a table, made when they are asked for.

    Args:
        table: where they are.
        numbers: [n] int64, their numbers in it.
    """

    def __init__(self, table: TokenTable, numbers: NDArray[np.int64]) -> None:
        self._table, self._numbers = table, numbers

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> TokenRow | TokenRows:
        if isinstance(index, slice):
            return TokenRows(self._table, self._numbers[index])
        return self._table.row(int(self._numbers[index]))

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        offsets = self._table.offsets
        return tuple((offsets[self._numbers + 1] - offsets[self._numbers]).tolist())

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of each row, -1 where it has none."""
        return self._table.columns.labels[self._numbers]

    @property
    def persons(self) -> tuple[int, ...] | None:
        """The person of each row, numbered from 0 as they first stand in these rows; None where a row names none."""
        known = self._table.columns.persons[self._numbers]
        if (known < 0).any():
            return None
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(person, len(numbers)) for person in known.tolist())

    def num_units(self, unit: str) -> int:
        """Return the number of what a privacy unit protects among the rows: persons for "user", else rows."""
        return len(np.unique(self._table.columns.persons[self._numbers])) if unit == "user" else len(self)


class JoinedRows(Sequence[TokenRow]):
    """The rows of several sequences one after the other, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[TokenRow]]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(len(part) for part in self._parts))

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0


def lengths_of(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """Return the number of tokens of each row, without making rows of a table."""
    return rows.lengths if isinstance(rows, TokenRows) else tuple(map(len, rows))
