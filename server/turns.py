"""Whom a round asks, and when: the draw of its sites, those of them that are free, and when it has enough."""

from __future__ import annotations

from collections.abc import Sequence, Set

from common.config.run import RunConfig
from server.cohort import number_closing, sample_cohort
from server.rounds import Round
from server.site_level import SiteLevel
from server.steering import Steering


class Turns:
    """Decides it from round to round.

    Args:
        config: the run config.
        steering: may change how many sites are asked.
        site_level: what protects whole sites, if anything does: then it draws them.
    """

    def __init__(self, config: RunConfig, steering: Steering, site_level: SiteLevel | None) -> None:
        self._config, self._steering, self._site_level = config, steering, site_level
        self._steered = config
        self._members: Sequence[str] = ()
        self._drawn: list[str] = []

    def draw(self, number: int, members: Sequence[str], busy: Set[str]) -> list[str]:
        """Draw the sites of round ``number`` and return those that it asks at once."""
        federation = self._config.federation
        asked = self._steering.sites_per_round(federation.sites_per_round)
        steered = federation.model_copy(update={"sites_per_round": asked})
        self._steered = self._config.model_copy(update={"federation": steered})  # it draws sites and is never sent
        self._members = members
        if self._site_level is not None:
            self._drawn = self._site_level.cohort(members, number)
        else:
            working: Set[str] = frozenset() if federation.carries else busy
            self._drawn = sample_cohort([name for name in members if name not in working], self._steered, number)
        return self.free(busy)

    def free(self, busy: Set[str], current: Round | None = None) -> list[str]:
        """Return the drawn sites to ask now, in their turns, as many as may work.

        Not those that owe something, are in ``current`` already, or were found out in it.
        """
        asked = busy if current is None else busy | current.cohort.keys() | current.counted | current.found_out
        return [name for name in self._drawn if name not in asked][: self.room(busy)]

    def room(self, busy: Set[str]) -> int | None:
        """Return how many more sites may be at work; None where there is no such number."""
        federation = self._steered.federation
        if federation.mode == "sync":
            return None
        return max(0, (federation.sites_per_round or len(self._members)) - len(busy))

    def is_full(self, current: Round) -> bool:
        """Whether a round has the number of updates at which it closes."""
        closing = number_closing(self._steered)
        return closing is not None and current.count >= closing
