"""What enters the lowest block that training changes, computed once a row: below it the model gives the same always.

Where adapters sit on upper layers alone (``adapter.target_modules`` that names them), or only the head is trained, the
blocks below are run once for each row and never again. The base has no dropout, so this is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.batches import Collator, Limit, TokenRow, micro_batches
from common.models.adapter import AdaptedModel
from common.models.packing import Start

FROZEN_BYTES = 2**30
"""Most memory for what is kept of the training rows of all sites of a run, and as much of its test rows.

Of sites the first in order of name are kept whose states fit together, so that no process has more and all agree on
which: what is computed with states and without agrees to rounding only. Rows beyond it are computed anew every time.
"""


@dataclass(frozen=True, eq=False)
class FrozenStates:
    """States of some rows' tokens where a block begins.

    Attributes:
        depth: the block, from 0.
        table: [N, d], the tokens of all rows, in the precision they are computed in, on the model's device.
        starts: where each row begins in ``table``, and its end after the last.
    """

    depth: int
    table: Tensor
    starts: list[int]

    @property
    def size_bytes(self) -> int:
        """Memory of the table."""
        return self.table.nbytes

    def start(self, rows: Sequence[int]) -> Start:
        """Return where a packed forward pass of ``rows`` starts."""
        parts = [self.table[self.starts[row] : self.starts[row + 1]] for row in rows]
        return Start(self.depth, torch.cat(parts).unsqueeze(0))


def changing_block(model: AdaptedModel, *, head_only: bool) -> int:
    """Return the lowest block that training changes, from 0; the last if it changes what follows the blocks alone."""
    blocks = model.base.family.blocks
    if blocks is None:
        return 0
    found = [re.search(rf"\.{re.escape(blocks.path)}\.(\d+)\.", name) for name in model.parameters]
    depths = [] if head_only else [int(match[1]) for match in found if match is not None]
    return min([*depths, model.num_blocks - 1])


def frozen_states(
    model: AdaptedModel,
    rows: Sequence[TokenRow],
    limit: Limit,
    *,
    head_only: bool,
    room_bytes: int,
    tokens_before: int = 0,
) -> FrozenStates | None:
    """Compute the states of ``rows`` where training begins to change them.

    Args:
        model: the model; what it holds in the adapter does not matter.
        rows: tokenised rows.
        limit: how much is computed at once.
        head_only: whether factors stay as they were made, without effect.
        room_bytes: most memory to take, for these rows and the tokens before them.
        tokens_before: tokens of other rows that have the first claim to that memory, computed or not.

    Returns:
        None where nothing would be saved, the model pads its rows, or the room does not suffice.
    """
    lengths = [len(row) for row in rows]
    depth = changing_block(model, head_only=head_only) if model.packs else 0
    if depth == 0 or not rows or min(lengths) == 0:
        return None
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    table: Tensor | None = None
    with torch.no_grad():
        for chosen in micro_batches(lengths, range(len(rows)), limit):
            batch = collate([rows[index] for index in chosen]).to(model.device)
            states = model.states(batch.input_ids, batch.attention_mask, depth).squeeze(0)
            if table is None:
                if (tokens_before + starts[-1]) * states.shape[1] * states.element_size() > room_bytes:
                    return None
                table = states.new_empty(starts[-1], states.shape[1])
            for index, own in zip(chosen, torch.split(states, [lengths[index] for index in chosen]), strict=True):
                table[starts[index] : starts[index + 1]] = own
    return None if table is None else FrozenStates(depth, table, starts)
