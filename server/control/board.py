"""Where a run stands, kept up to date by the round loop and read by those who watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.config.run import RunConfig
from server.events import Observer
from server.outcome import Outcome


@dataclass(frozen=True)
class SiteStanding:
    """One site in the round in progress, or the last one; ``status`` as in control.proto."""

    status: str = "idle"
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    answered_after_s: float | None = None


@dataclass(frozen=True)
class Standing:
    """A run at one moment; see RunView in control.proto."""

    run: str
    phase: str = "joining"
    round: int = 0
    rounds: int = 0
    completed_rounds: int = 0
    sites: dict[str, SiteStanding] = field(default_factory=dict)
    round_began_s: float | None = None
    epsilon: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    ended: str = ""
    reason: str = ""


class Board(Observer):
    """Observes a run and tells whoever waits for a change.

    Args:
        run: name of the run.
        rounds: of the run.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, run: str, rounds: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._version, self._standing = 0, Standing(run, rounds=rounds)

    def read(self) -> tuple[int, Standing]:
        """Return a number that grows with every change, and where the run stands."""
        with self._changed:
            return self._version, self._standing

    def wait(self, seen: int, seconds: float) -> tuple[int, Standing]:
        """Return :meth:`read` as soon as its number is larger than ``seen``, or after ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > seen, seconds)
            return self._version, self._standing

    def elapsed_s(self, standing: Standing) -> float | None:
        """Return the seconds since the round in progress began."""
        return None if standing.round_began_s is None else self._clock() - standing.round_began_s

    def touch(self) -> None:
        """Tell those who wait, though nothing that is kept here has changed."""
        self._set()

    def paused(self, number: int) -> None:
        """Round ``number`` waits for an operator."""
        self._set(phase="paused")

    def resumed(self) -> None:
        """The run goes on."""
        self._set(phase="between")

    def ended(self, how: str, reason: str = "") -> None:
        """The run is over: "completed", "stopped" or "failed"."""
        self._set(phase="ended", ended=how, reason=reason, round_began_s=None)

    def run_started(self, config: RunConfig, sites: Sequence[str], completed_rounds: int) -> None:
        """The federation is complete."""
        self._set(
            phase="evaluating" if completed_rounds == 0 else "between", rounds=config.federation.rounds,
            round=completed_rounds, completed_rounds=completed_rounds, sites={site: SiteStanding() for site in sites},
        )  # fmt: skip

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        """Requests of a round are going out."""
        known = {site: SiteStanding() for site in self._standing.sites}
        known.update({site: SiteStanding("asked") for site in cohort})
        self._set(phase="training", round=number, sites=known, round_began_s=self._clock())

    def sites_asked(self, number: int, sites: Sequence[str]) -> None:
        """Further requests of a round are going out."""
        self._set(sites={**self._standing.sites, **{site: SiteStanding("asked") for site in sites}})

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        """A site's reply was taken, or given up."""
        standing = self._standing
        after = self.elapsed_s(standing)
        answered = SiteStanding(outcome.status, outcome.reason or "", outcome.bytes_up, outcome.bytes_down, after)
        self._set(
            sites={**standing.sites, site: answered}, bytes_up=standing.bytes_up + outcome.bytes_up,
            bytes_down=standing.bytes_down + outcome.bytes_down,
        )  # fmt: skip

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """A round is complete; sites that never answered are late, or spare."""
        standing = self._standing
        sites, down = dict(standing.sites), standing.bytes_down
        for site, outcome in record["sites"].items():
            status = outcome["status"]
            if status in ("late", "spare") and sites.get(site, SiteStanding()).status != status:
                sites[site] = SiteStanding(status, outcome["reason"] or "", bytes_down=outcome["bytes_down"])
                down += outcome["bytes_down"]
        self._set(
            phase="between", completed_rounds=record["round"], sites=sites, bytes_down=down, epsilon=epsilon,
            round_began_s=None,
        )  # fmt: skip

    def evaluated(self, record: dict[str, Any]) -> None:
        """The adapter was evaluated."""
        self._set(metrics={name: float(value) for name, value in record["metrics"]["overall"].items()})

    def _set(self, **changes: Any) -> None:
        with self._changed:
            self._standing = replace(self._standing, **changes)
            self._version += 1
            self._changed.notify_all()
