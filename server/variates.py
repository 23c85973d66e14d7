"""The coordinator's side of SCAFFOLD: the shared control variate, and what sites change in it in a round.

See :mod:`common.variates` for the algorithm.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import AdmissionError
from common.privacy.planning import plain_steps
from common.tensors import Tensors, add
from common.variates import change_of, marked, parted
from server.aggregation.exact_sum import ExactSum

logger = logging.getLogger(__name__)

LARGEST_CHANGE = 1e3
"""Largest entry of a Δc_i that is taken: a mean gradient far beyond any training, and small enough to be added up."""
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Controls:
    """What a coordinator carries of control variates from round to round.

    Attributes:
        shared: c by name; empty before the first round, which is zero.
        taken: the last round in which each site's change was taken, by site; those that are missing had none.
        weights: p_i of all sites whose mean c is, not normalised.
    """

    shared: Tensors = field(default_factory=dict)
    taken: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


class ControlRound:
    """Collects the changes of a round.

    c is the mean of all c_i, and only while the sites and their weights stay the same do the changes keep it that. With
    others, all variates start again at zero: c here, and each c_i at its site, which is told that none was taken.

    Args:
        number: of the round.
        before: what the rounds before left.
        trained: the tensors that have variates, for their shapes.
        config: the run config.
        weights: declared, of all sites of the federation.
        unit: the weight that counts 1 in the round.
    """

    def __init__(
        self, number: int, before: Controls, trained: Mapping[str, Tensor], config: RunConfig,
        weights: Mapping[str, float], unit: float,
    ) -> None:  # fmt: skip
        if before.shared and before.weights != weights:
            logger.warning(
                "round %d: sites or weights are not those before; control variates start again at zero", number
            )
            before = Controls()
        self._number, self._config, self._weights = number, config, dict(weights)
        self._total = sum(weights.values()) / unit
        self.shared = before.shared or {name: torch.zeros_like(value) for name, value in trained.items()}
        self._taken = dict(before.taken)
        self._changes = ExactSum.zero(self.shared)

    def payload(self) -> Tensors:
        """Return what every site is sent: c, under its names on the wire."""
        return marked(self.shared)

    def taken(self, site: str) -> int:
        """Return the last round in which the change of ``site`` was taken, 0 for none."""
        return self._taken.get(site, 0)

    def admit(self, payload: Tensors, steps: int, num_examples: int) -> tuple[Tensors, Tensors]:
        """Return a site's update and its Δc_i, if that is the one which follows from the update.

        Args:
            payload: what the site sent, decoded and finite.
            steps: that it says it took.
            num_examples: rows that it declared, from which its steps follow.

        Raises:
            AdmissionError: reason "variates".
        """
        update, change = parted(payload)
        planned = plain_steps(self._config, num_examples)
        if steps != planned:
            raise AdmissionError("variates", f"{steps} steps were taken; expected {planned}, from the rows declared")
        wanted = change_of(update, self.shared, self._config.training, steps)
        for name, value in wanted.items():
            scale = float(value.abs().max()) + float(self.shared[name].abs().max())
            if scale > LARGEST_CHANGE:
                raise AdmissionError("variates", f"{name} moves by {scale:.3g}; expected at most {LARGEST_CHANGE:g}")
            if float((change[name] - value).abs().max()) > _TOLERANCE * scale:
                raise AdmissionError(
                    "variates", f"the change of {name} does not follow from the update; expected it to"
                )
        return update, change

    def add(self, site: str, change: Tensors, weight: float) -> None:
        """Add what :meth:`admit` let in."""
        self._changes.add(change, weight)
        self._taken[site] = self._number

    def finish(self) -> Controls:
        """Return c ← c + Σ_S p_i Δc_i, and whose changes are in it."""
        if self._changes.count == 0:
            return Controls(self.shared, self._taken, self._weights)
        share = float(self._changes.weight) / self._total
        mean = {name: (value.double() * share).float() for name, value in self._changes.mean().items()}
        return Controls(add(self.shared, mean), self._taken, self._weights)
