"""One round: requests to its cohort, replies taken as they come, and the next adapter."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import filterfalse
from statistics import fmean
from typing import Any

import torch

from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import AdmissionError, RunError
from common.factors import fixed_ranks, is_fixed, with_rank
from common.methods import method_of, personal_names, received_names, sent_names
from common.models.adapter import fresh_factors
from common.randomness import torch_generator
from common.tensors import Tensors, add, l2_norm, manifest_of
from common.wire import TrainRequest, header_bytes
from server.admission import Admission
from server.aggregation.catalog import aggregator_of
from server.aggregation.optimizers import optimized
from server.aggregation.products import RoundProducts, measure
from server.aggregation.robust import combine
from server.cohort import Member
from server.site_level import COORDINATOR, SiteLevel


@dataclass(frozen=True)
class Outcome:
    """What became of one site in one round.

    Attributes:
        status: "admitted", "rejected", "failed" (the node or Flower reported an error) or "late".
        reason: why it was not admitted.
        bytes_down: bytes of the request, header and payload.
        bytes_up: bytes of the reply.
        steps: local steps.
        weight: in the average, relative to the largest of the cohort.
        update_norm: L2 norm of the update as it arrived; withheld under site-level privacy.
        train_loss: None under differential privacy, unless it is released and charged.
        mechanism: noise multiplier, sample rate and steps that the site's ledger is charged for having been asked.
    """

    status: str
    reason: str | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    steps: int = 0
    weight: float = 0.0
    update_norm: float | None = None
    train_loss: float | None = None
    mechanism: dict[str, float] | None = None


class Round:
    """Collects one round.

    Args:
        number: from 1.
        cohort: members that are asked, by site name.
        adapter: the whole adapter that the round starts from, with its correction.
        config: the run config.
        admission: the checks.
        base: fingerprint of the base model.
        run: the run's id.
        clip_norm: where adaptive clipping stands.
        site_level: what protects whole sites, if anything does.
        moments: of the server optimizer, from the rounds before.
    """

    def __init__(
        self, number: int, cohort: Mapping[str, Member], adapter: Tensors, config: RunConfig,
        admission: Admission, base: str, run: str, clip_norm: float | None = None, site_level: SiteLevel | None = None,
        moments: Tensors | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.cohort = dict(cohort)
        self.outcomes: dict[str, Outcome] = {}
        self.moments = {} if moments is None else moments
        self._config, self._method = config, method_of(config)
        self._adapter = fresh_factors(adapter, config.seed, number) if self._method.fresh else adapter
        self._site_level = site_level
        self._clip_norms: dict[str, float] = {}
        self._admission = admission
        self._aggregator = aggregator_of(config.aggregation)
        self._sent = sorted(sent_names(config, filterfalse(is_fixed, self._adapter), number))
        self._state = self._aggregator.init({name: self._adapter[name] for name in self._sent})
        self._local: dict[str, Tensors] = {}
        self._updates: dict[str, Tensors] = {}
        seen = site_level is None and not personal_names(config, self._adapter)
        self._measures = seen and config.evaluation.products
        self._measured: RoundProducts | None = None
        self._ranks = {site: member.rank(config) for site, member in self.cohort.items()}
        self._payloads = {rank: self._packed(rank) for rank in set(self._ranks.values())}
        self._requests = {
            site: TrainRequest(
                config_digest=config.digest(),
                run=run,
                clip_norm=clip_norm,
                round=number,
                nonce=secrets.token_hex(16),
                base_fingerprint=base,
                fixed_ranks=fixed_ranks(self._adapter),
            )
            for site in self.cohort
        }
        declared = {site: member.weight(config) for site, member in self.cohort.items()}
        largest = max(declared.values(), default=1.0)
        self._weights = {site: weight / largest for site, weight in declared.items()}
        self._started = time.perf_counter()
        self._aggregating = 0.0

    def request(self, site: str) -> tuple[bytes, bytes]:
        """Return header and payload of the request to ``site``: no more than its rank can hold."""
        return header_bytes(self._requests[site]), self._payloads[self._ranks[site]]

    def take(self, site: str, header: bytes, payload: bytes) -> Outcome:
        """Admit or reject the reply of ``site`` and, if admitted, add its update. A site counts once."""
        if site in self.outcomes:
            return self.outcomes[site]
        began = time.perf_counter()
        up, weight = len(header) + len(payload), self._weights[site]
        start = with_rank(self._adapter, self._ranks[site])
        manifest = manifest_of({name: start[name] for name in self._sent})
        try:
            reply, update = self._admission.admit(header, payload, self._requests[site], self.cohort[site], manifest)
            self._add(site, start, update, weight)
        except AdmissionError as error:
            outcome = self._outcome(site, "rejected", reason=str(error), bytes_up=up)
        else:
            told = {} if self._site_level else {"update_norm": l2_norm(update), "train_loss": reply.train_loss}
            outcome = self._outcome(site, "admitted", bytes_up=up, steps=reply.steps, weight=weight, **told)
            if reply.clip_norm is not None:
                self._clip_norms[site] = reply.clip_norm
        self._aggregating += time.perf_counter() - began
        return outcome

    def fail(self, site: str, status: str, reason: str) -> Outcome:
        """Record that no usable reply of ``site`` will come."""
        if site in self.outcomes:
            return self.outcomes[site]
        return self._outcome(site, status, reason=reason)

    def finish(self) -> Tensors:
        """Return the next adapter, whole.

        Raises:
            RunError: with fewer admitted updates than ``federation.min_sites``. Under site-level privacy the number of
                sites is left to chance, and only a round that lost all it had asked fails.
        """
        for site in self.cohort.keys() - self.outcomes.keys():
            self.fail(site, "late", "no reply within federation.round_timeout_s")
        admitted = [site for site, outcome in self.outcomes.items() if outcome.status == "admitted"]
        least = self._config.federation.min_sites if self._site_level is None else min(1, len(self.cohort))
        if len(admitted) < least:
            lost = {site: o.reason for site, o in sorted(self.outcomes.items()) if o.status != "admitted"}
            site, reason = next(iter(lost.items()))
            raise RunError(
                f"round {self.number} has {len(admitted)} usable updates; expected at least {least} "
                f"(federation.min_sites). First of {len(lost)} lost: site {site!r}, {reason}."
            )
        began = time.perf_counter()
        adapter = self._aggregated(len(admitted))
        if self._local:
            weights = {site: self._weights[site] for site in self._local}
            self._measured = measure(self._adapter, adapter, self._local, weights)
        self._aggregating += time.perf_counter() - began
        return adapter

    def clip_norm(self) -> float | None:
        """Return the geometric mean of the clip norms that sites ended at; None where none told one."""
        if not self._clip_norms:
            return None
        return math.exp(fmean(math.log(self._clip_norms[site]) for site in sorted(self._clip_norms)))

    def record(self) -> dict[str, Any]:
        """Return the round as plain values for ``metrics.jsonl``; seconds of training are those waiting for sites."""
        total = time.perf_counter() - self._started
        return {
            "kind": "round",
            "round": self.number,
            "sites": {site: asdict(self.outcomes[site]) for site in sorted(self.outcomes)},
            "products": asdict(self._measured) if self._measured else None,
            "seconds": {
                "total": total,
                "training": total - self._aggregating,
                "aggregation": self._aggregating,
            },
        }

    def _packed(self, rank: int) -> bytes:
        """Return what a site of ``rank`` is sent; the adapter itself keeps its bits, whatever the codec rounds."""
        fixed = {name for name in self._adapter if is_fixed(name)}
        names = received_names(self._config, self._adapter.keys() - fixed, self.number) | fixed
        sent = with_rank({name: self._adapter[name] for name in names}, rank)
        draw = torch_generator(self._config.seed, "codec", self.number, COORDINATOR, rank)
        return encode(sent, Packing.of_adapter(self._config.communication), draw)

    def _add(self, site: str, start: Tensors, update: Tensors, weight: float) -> None:
        """Hand an admitted update to the method, and keep it to be measured where that tells nothing it must not."""
        private = update if self._site_level is None else self._site_level.clip(update)
        local = add(start, update)
        added = private if self._method.linear else {name: local[name] for name in self._sent}
        self._state = self._aggregator.update(self._state, site, added, weight)
        if self._config.aggregation.robust != "none":
            self._updates[site] = update
        if self._measures:
            self._local[site] = local

    def _aggregated(self, count: int) -> Tensors:
        """Return the next adapter from ``count`` updates."""
        if not self._method.linear:
            return self._aggregator.finish(self._state, self._adapter) if count else self._adapter
        rule = self._config.aggregation.robust
        if rule != "none":
            weights = {site: self._weights[site] for site in self._updates}
            bad, rank = self._config.aggregation.robust_sites, self._config.adapter.rank
            scale = self._config.adapter.alpha / rank
            mean = combine(rule, bad, self._adapter, self._updates, weights, scale)
        elif count:
            mean = self._state.mean()
        else:
            mean = {name: torch.zeros_like(self._adapter[name]) for name in self._sent}
        if self._site_level is not None:
            mean = self._site_level.noised(mean, count, self.number)
        if self._config.aggregation.server_optimizer != "none":
            mean, self.moments = optimized(mean, self.moments, self._config.aggregation)
        return self._aggregator.finish(mean, self._adapter)

    def _outcome(self, site: str, status: str, **known: Any) -> Outcome:
        mechanism = self.cohort[site].description.mechanism
        header, payload = self.request(site)
        self.outcomes[site] = Outcome(
            status=status,
            bytes_down=len(header) + len(payload),
            mechanism=mechanism.model_dump() if mechanism else None,
            **known,
        )
        return self.outcomes[site]
