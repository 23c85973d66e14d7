"""Evaluating an adapter on test rows, in all and by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.data.batches import Collator, Limit, TokenRow, micro_batches
from common.data.examples import Example
from common.data.token_table import JoinedRows, TokenRows, lengths_of
from common.models.adapter import AdaptedModel
from common.models.frozen import FROZEN_BYTES, FrozenStates, frozen_states
from common.tasks.catalog import TASKS
from common.tasks.task import Metrics

TOKENS_PER_BATCH = {"cpu": 2048}
"""Tokens computed at once; other devices take 16,384."""


PersonalOf = Callable[[str], Mapping[str, Tensor]]
"""From a site to the tensors that only it has; none where it has none. Asked site after site, so that those of many
need not be in memory together."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one adapter.

    Attributes:
        overall: over all rows.
        by_site: over the rows of each site.
        worst_site: the site with the worst headline metric, None where there are no sites.
    """

    overall: Metrics
    by_site: dict[str, Metrics] = field(default_factory=dict)
    worst_site: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return {"overall": self.overall, "by_site": self.by_site, "worst_site": self.worst_site}


class Evaluator:
    """Evaluates adapters on a fixed test part, tokenised once.

    Args:
        model: the resident model; its adapter values are overwritten by :meth:`__call__`.
        config: the run config.
        test: test rows of each site, as examples or tokenised.
    """

    def __init__(
        self, model: AdaptedModel, config: RunConfig, test: Mapping[str, Sequence[Example]] | Mapping[str, TokenRows]
    ) -> None:
        self._model = model
        self._task = TASKS[config.data.task]
        self.sites = tuple(test)
        tokenizer = model.base.tokenizer
        parts: list[Sequence[TokenRow]] = []
        self._lengths: list[int] = []
        for site in self.sites:
            known = test[site]
            rows = known if isinstance(known, TokenRows) else self._task.tokenise(known, tokenizer, config.data)
            parts.append(rows)
            self._lengths += lengths_of(rows)
        self._rows = JoinedRows(parts)
        self._ends = [0, *accumulate(len(part) for part in parts)]
        self._owner = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
        self._collate = Collator(tokenizer.pad_token_id, model.base.family.padding_side)

    def __call__(self, adapter: Mapping[str, Tensor], personal: PersonalOf | None = None) -> Evaluation:
        """Evaluate ``adapter`` (tensors by saved name); for ``personal`` see :meth:`row_sums`."""
        sums = self.row_sums(adapter, personal)
        by_owner = torch.zeros(len(self.sites), sums.shape[1], dtype=sums.dtype).index_add_(0, self._owner, sums)
        by_site = {site: self._metrics(added) for site, added in zip(self.sites, by_owner, strict=True)}
        headline = self._task.headline
        sign = 1.0 if self._task.higher_is_better else -1.0
        worst = min(by_site, key=lambda site: sign * by_site[site][headline], default=None)
        return Evaluation(self._metrics(sums.sum(dim=0)), by_site, worst)

    @property
    def owners(self) -> tuple[str, ...]:
        """The site of every row, in the order of :meth:`row_sums`."""
        return tuple(self.sites[index] for index in self._owner.tolist())

    def row_sums(self, adapter: Mapping[str, Tensor], personal: PersonalOf | None = None) -> Tensor:
        """Return what every row adds to the metrics under ``adapter``: float64 [N, len(task.sum_names)].

        Args:
            adapter: whole adapter.
            personal: the tensors of a site that take the place of the adapter's on its rows.
        """
        table = torch.zeros(len(self._rows), len(self._task.sum_names), dtype=torch.float64)
        common: list[int] = []
        for site, (start, end) in zip(self.sites, pairwise(self._ends), strict=True):
            own = {} if personal is None else personal(site)
            if own:
                self._model.load({**adapter, **own})
                self._sum_into(table, range(start, end))
            else:
                common += range(start, end)
        if common:
            self._model.load(adapter)
            self._sum_into(table, common)
        return table

    def _metrics(self, added: Tensor) -> Metrics:
        return self._task.metrics(dict(zip(self._task.sum_names, added.tolist(), strict=True)))

    def _sum_into(self, table: Tensor, rows: Sequence[int]) -> None:
        """Put the sums of some rows into their places in ``table``, float64 [N, len(sum_names)]."""
        lengths = self._lengths
        self._model.module.eval()
        states = self._states
        with torch.inference_mode():
            for indices in micro_batches(lengths, rows, self._limit):
                batch = self._collate([self._rows[index] for index in indices]).to(self._model.device)
                start = None if states is None else states.start(indices)
                logits = self._model.logits(batch.input_ids, batch.attention_mask, start)
                table[indices] = self._task.sums(logits, batch).cpu()

    @cached_property
    def _limit(self) -> Limit:
        budget = TOKENS_PER_BATCH.get(self._model.device.type, 16384)
        if self._model.packs:
            return Limit(tokens=budget)
        return Limit(rows=max(1, budget // max(self._lengths)))

    @cached_property
    def _states(self) -> FrozenStates | None:
        """What enters the lowest block that has factors: the same for every adapter."""
        return frozen_states(self._model, self._rows, self._limit, head_only=False, room_bytes=FROZEN_BYTES)
