"""What happens in a run, for those who watch it. The round loop calls; an observer shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.config.run import RunConfig
from server.outcome import Outcome


class Observer:
    """Watches a run. Every method does nothing here; override those of interest."""

    def run_started(self, config: RunConfig, sites: Sequence[str], completed_rounds: int) -> None:
        """The federation is complete; ``completed_rounds`` were done before a resume."""

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        """Requests of a round are going out."""

    def sites_asked(self, number: int, sites: Sequence[str]) -> None:
        """Further requests of a round are going out: to sites that come in while it is on, or that are asked again."""

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        """A site's reply was taken, or given up."""

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """A round is complete and checkpointed; ``epsilon`` is the largest spent at any site."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """The adapter was evaluated."""
