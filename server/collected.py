"""The admitted updates of a round, and the adapter that the method makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import filterfalse

import torch

from common.config.run import RunConfig
from common.errors import AdmissionError
from common.factors import factors_of, is_factor, is_fixed, with_rank
from common.methods import method_of, personal_names, sent_names
from common.tensors import Tensors, add
from server.aggregation.catalog import aggregator_of
from server.aggregation.optimizers import optimized
from server.aggregation.products import RoundProducts, measure
from server.aggregation.robust import RULES, coefficients, combine_by_entry, combine_by_site, held_against
from server.bounds import beyond_use
from server.site_level import SiteLevel


class Collected:
    """Collects one round's updates.

    Args:
        number: of the round.
        adapter: the whole adapter that the round's sites start from, with its correction.
        config: the run config.
        site_level: what protects whole sites, if anything does.
        moments: of the server optimizer, from the rounds before.

    Attributes:
        sent: names of what sites send in this round, sorted.
        moments: of the server optimizer.
        products: what the aggregation did, once it is done; None where that must not be told.
        shares: what a robust rule counted each update, by key, once it is done; None for a rule by entry.
    """

    def __init__(
        self, number: int, adapter: Tensors, config: RunConfig, site_level: SiteLevel | None, moments: Tensors
    ) -> None:
        self.moments = moments
        self.sent = sorted(sent_names(config, filterfalse(is_fixed, adapter), number))
        self.products: RoundProducts | None = None
        self.shares: dict[str, float] | None = None
        self._number, self._adapter, self._config, self._site_level = number, adapter, config, site_level
        self._method, self._aggregator = method_of(config), aggregator_of(config.aggregation)
        self._state = self._aggregator.init({name: adapter[name] for name in self.sent})
        self._weights: dict[str, float] = {}
        self._local: dict[str, Tensors] = {}
        self._updates: dict[str, Tensors] = {}
        self._personal = bool(personal_names(config, adapter))
        self._alone = self.sent if self._personal or not any(map(is_factor, self.sent)) else ()
        self._measures = site_level is None and config.evaluation.products

    @property
    def count(self) -> int:
        """Number of updates."""
        return len(self._weights)

    def add(self, key: str, rank: int, update: Tensors, weight: float) -> None:
        """Hand an update to the method, and keep it to be measured where that tells nothing it must not.

        Args:
            key: of the update: its site, or its site and earlier round.
            rank: of the site's factors.
            update: by name, float32.
            weight: in the average, at most 1.

        Raises:
            AdmissionError: if its values are too large to go on from; then nothing was added.
        """
        private = update if self._site_level is None else self._site_level.clip(update)
        local = add(with_rank(self._adapter, rank), update)
        if self._site_level is None and (found := beyond_use(local, factors_of)) is not None:
            raise AdmissionError("range", f"the site's own adapter has {found}; it is broken, or training.lr too high")
        added = private if self._method.linear else {name: local[name] for name in self.sent}
        self._state = self._aggregator.update(self._state, key, added, weight)
        self._weights[key] = weight
        if self._config.aggregation.robust != "none":
            self._updates[key] = update
        if self._measures:
            self._local[key] = local

    def aggregated(self, hidden: int) -> Tensors:
        """Return the next adapter, whole.

        Args:
            hidden: number of bad sites among the updates that a robust rule must hold against.

        Raises:
            RunError: with fewer updates than a robust rule needs.
        """
        adapter = self._aggregated(hidden)
        if self._local:
            found = measure(self._adapter, adapter, self._local, self._weights, self._alone)
            self.products = replace(found, error=None) if found and self._personal else found
        return adapter

    def _aggregated(self, hidden: int) -> Tensors:
        count, settings = self.count, self._config.aggregation
        bad = held_against(settings.robust, hidden, settings.robust_sites, count)
        if settings.robust in RULES:
            scale = self._config.adapter.alpha / self._config.adapter.rank
            self.shares = coefficients(settings.robust, bad, self._adapter, self._updates, self._weights, scale)
        if not self._method.linear:
            if self.shares is not None:
                self._state = self._state.weighed(self.shares)
            return self._aggregator.finish(self._state, self._adapter) if count else self._adapter
        if self.shares is not None:
            mean = combine_by_site(self._updates, self.shares)
        elif settings.robust != "none":
            mean = combine_by_entry(settings.robust, bad, self._updates)
        elif count:
            mean = self._state.mean()
        else:
            mean = {name: torch.zeros_like(self._adapter[name]) for name in self.sent}
        if self._site_level is not None:
            mean = self._site_level.noised(mean, count, self._number)
        if settings.server_optimizer != "none":
            mean, self.moments = optimized(mean, self.moments, settings)
        return self._aggregator.finish(mean, self._adapter)
