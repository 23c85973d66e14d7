"""Head-only training on features that are computed once: the frozen part of the model gives the same for a row always.

A head that is one linear layer on one vector a row, as BERT's and the mean-pooled classifier's, needs no more of the
base model than that vector. A round then costs what the head costs. Of the other models, the blocks below the lowest
adapter are left out (:mod:`common.models.frozen`).
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from client.site import Site
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.data.batches import Collator, Limit, micro_batch_limit, micro_batches
from common.data.token_table import TokenRows
from common.models.adapter import AdaptedModel
from common.models.frozen import FROZEN_BYTES, FrozenStates, changing_block, frozen_states


class RowFeatures:
    """Features of the rows of a site.

    Attributes:
        table: float32 [N, d], on the model's device.
    """

    def __init__(self, head: nn.Module, table: Tensor) -> None:
        self._head = head
        self.table = table

    def logits(self, rows: list[int]) -> Tensor:
        """Return the head's logits for some rows: [b, L] float32, with gradients to the head."""
        logits: Tensor = self._head(self.table[rows])
        return logits.float()


def row_features(model: AdaptedModel, site: Site, config: RunConfig) -> RowFeatures | None:
    """Return the features of a site's rows, or None where the model has to be run for every step."""
    if not may_have_features(model, config):
        return None
    known = _KNOWN.get(site)
    if known is None or known[0] is not model:
        limit = micro_batch_limit(config.training.micro_batch_size, model.device, packed=model.packs)
        known = _KNOWN[site] = (model, _computed(model, site, limit))
    return known[1]


def site_states(model: AdaptedModel, site: Site, config: RunConfig) -> FrozenStates | None:
    """Return what enters the lowest block that training changes, for a site's rows; None where all blocks are run.

    Which of the two follows from the run's data alone (:data:`common.models.frozen.FROZEN_BYTES`), not from which sites
    this process has seen: either way is the other to rounding, and no engine or resume may change a bit.
    """
    head_only = config.adapter.kind == "head_only"
    if head_only and any(bool(value.any()) for name, value in model.parameters.items() if ".lora_B." in name):
        return None
    rows = site.rows if isinstance(site.rows, TokenRows) else site
    limit = micro_batch_limit(config.training.micro_batch_size, model.device, packed=model.packs)
    block = changing_block(model, head_only=head_only)
    origin = (config.model, model.base.fingerprint, str(model.device), block, limit)
    known = _STATES.get(rows)
    if known is None or known[0] != origin:
        for other, (made, _) in list(_STATES.items()):
            if made != origin:  # a process has one base model: that one is gone
                del _STATES[other]
        found = frozen_states(
            model, site.rows, limit, head_only=head_only, room_bytes=FROZEN_BYTES, tokens_before=site.tokens_before
        )
        known = _STATES[rows] = (origin, found)
        _forget_beyond_limit()
    return known[1]


def may_have_features(model: AdaptedModel, config: RunConfig) -> bool:
    """Whether nothing but a head of one layer is trained, so that rows may have features."""
    return config.adapter.kind == "head_only" and len(model.base.family.heads) == 1


def _forget_beyond_limit() -> None:
    """Forget the oldest states until the rest fit.

    Those of one run fit, so that what goes is another deal's as a rule; what is missed is computed again, to the same
    bits.
    """
    held = {rows: states.size_bytes for rows, (_, states) in _STATES.items() if states is not None}
    excess = sum(held.values()) - FROZEN_BYTES
    for rows, size_bytes in held.items():
        if excess <= 0:
            return
        del _STATES[rows]
        excess -= size_bytes


_Origin = tuple[ModelConfig, str, str, int, Limit]
"""What states follow from besides the rows: base model and its fingerprint, device, the block they enter, and how many
rows are computed at once."""

_STATES: WeakKeyDictionary[Site | TokenRows, tuple[_Origin, FrozenStates | None]] = WeakKeyDictionary()
"""States by the rows of a virtual site, which several runs on the same data share, or by the real site they are of; for
as long as it is held."""

_KNOWN: WeakKeyDictionary[Site, tuple[AdaptedModel, RowFeatures | None]] = WeakKeyDictionary()
"""Features by site, for as long as the site is held."""


def _computed(model: AdaptedModel, site: Site, limit: Limit) -> RowFeatures | None:
    head = model.module.get_submodule(f"base_model.model.{model.base.family.heads[0]}")
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    table: Tensor | None = None
    was_training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad():
            for chosen in micro_batches(site.lengths, range(len(site.rows)), limit):
                batch = collate([site.rows[index] for index in chosen]).to(model.device)
                seen, logits = _watched(model, head, batch.input_ids, batch.attention_mask)
                if seen.dim() != 2 or not torch.equal(head(seen).float(), logits):
                    return None
                if table is None:
                    table = torch.zeros(len(site.rows), seen.shape[1], device=model.device)
                table[chosen] = seen.float()
    finally:
        model.module.train(was_training)
    return None if table is None else RowFeatures(head, table)


def _watched(model: AdaptedModel, head: nn.Module, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model and return what its head was given, and the logits."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model.logits(input_ids, mask)
    finally:
        handle.remove()
    return seen[-1], logits
