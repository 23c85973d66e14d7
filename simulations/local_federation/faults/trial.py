"""One fault: a run, something killed in the middle of it, and what became of both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from common.errors import RunError
from server.run_place import RunPlace
from simulations.local_federation.faults.checks import (
    Entries,
    adapter_of,
    budget_is_right,
    closed_in_time,
    each_round_once,
    entries_of,
    rounds_of,
    rounds_repeated,
    same_bits,
)
from simulations.local_federation.faults.disturbed import DEADLINE_S, ROUNDS, Disturbed
from simulations.local_federation.faults.kinds import FAULTS

AWAY_S = 5.0
"""Seconds that a site is away where no round goes on without it."""
_TRIES = 3


@dataclass(frozen=True)
class Trial:
    """What became of one fault.

    Attributes:
        kind: of the fault.
        federation: "plain" or "private".
        moment_s: seconds from the submission to the kill.
        round: that was in progress; 0 before the first began.
        ended: how the run ended.
        submissions: of the run.
        rounds_repeated: rounds that were begun again.
        same_bits: whether the adapter has the bits of the undisturbed run; None with privacy.
        budgets: what is wrong with ledgers; None without them.
        in_time: whether no round closed later than its deadline; None where the coordinator itself was away.
        rejoined: whether the site was heard again, by itself; None where no site was hit.
        seconds: from the submission to the end of the run.
    """

    kind: str
    federation: str
    moment_s: float
    round: int
    ended: str
    submissions: int
    rounds_repeated: int
    same_bits: bool | None
    budgets: list[str] | None
    in_time: bool | None
    rejoined: bool | None
    seconds: float

    @classmethod
    def of_error(cls, kind: str, federation: str, error: str) -> Trial:
        """Return a fault whose run never came to an end."""
        return cls(kind, federation, 0.0, 0, error, 0, 0, None, None, None, None, 0.0)

    @property
    def sound(self) -> bool:
        """Whether all held that must."""
        held = (self.same_bits, self.in_time, self.rejoined)
        return self.ended == "completed" and self.rounds_repeated <= 1 and not self.budgets and False not in held

    def line(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"sound": self.sound}


@dataclass
class Trials:
    """Faults of one federation, one after the other.

    Attributes:
        made: the federation.
        adapter: of the undisturbed run.
        usual_s: seconds that a run takes.
    """

    made: Disturbed
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)
    usual_s: float = 0.0
    _number: int = 0

    def undisturbed(self) -> None:
        """Run once without a fault, for the bits and the time.

        Raises:
            RunError: if that run fails.
        """
        began = time.monotonic()
        place = self.made.submit("undisturbed")
        ended = self.made.wait_until_over(place)
        if ended != "completed" or place.submission().fence != 1:
            raise RunError(f"the undisturbed run is {ended!r}; expected it completed at once. Look at the logs.")
        self.adapter, self.usual_s = adapter_of(place), time.monotonic() - began

    def fault(self, kind: str, draw: np.random.Generator) -> Trial:
        """Kill something at a random moment of a run, and tell what became of it.

        Raises:
            RunError: if a run makes no progress, or was never hit.
        """
        moment, site = float(draw.uniform(0.0, self.usual_s)), str(draw.choice(sorted(self.made.sites)))
        for _ in range(_TRIES):
            found = self._try(kind, moment, site)
            if found is not None:
                return found
            moment /= 4  # the run was over before there was anything to kill
        raise RunError(f"no {kind} was there to be killed in {_TRIES} runs; expected one.")

    def _try(self, kind: str, moment: float, site: str) -> Trial | None:
        made, fault = self.made, FAULTS[kind]
        before = self._ledgers()
        self._number += 1
        began = time.monotonic()
        place = made.submit(f"{kind}-{self._number}")
        while time.monotonic() < began + moment and not place.submission().over:
            time.sleep(0.05)
        if not fault.strike(made, place, site):
            made.wait_until_over(place)
            return None
        moment, struck = time.monotonic() - began, place.completed_rounds()
        if kind == "site":
            self._bring_back(place, site, struck)
        ended = made.wait_until_over(place)
        seconds = time.monotonic() - began
        plain = made.kind == "plain"
        return Trial(
            kind=kind,
            federation=made.kind,
            moment_s=round(moment, 1),
            round=struck + 1,
            ended=ended if each_round_once(place, ROUNDS) else f"{ended}, with rounds {place.completed_rounds()}",
            submissions=len(place.submission().flower_runs),
            rounds_repeated=rounds_repeated(place, made.sites.values()),
            same_bits=same_bits(adapter_of(place), self.adapter) if plain and ended == "completed" else None,
            budgets=None if plain else self._wrong_budgets(before, place),
            in_time=closed_in_time(place, DEADLINE_S[made.kind]) if fault.at_site else None,
            rejoined=self._rejoined(place, site) if fault.at_site else None,
            seconds=round(seconds, 1),
        )

    def _ledgers(self) -> dict[str, Entries]:
        private = self.made.kind == "private"
        return {site: entries_of(places) for site, places in self.made.sites.items()} if private else {}

    def _wrong_budgets(self, before: dict[str, Entries], place: RunPlace) -> list[str]:
        after = self._ledgers()
        return [
            f"{site}: {wrong}"
            for site in before
            for wrong in budget_is_right(before[site], after[site], place, site, ROUNDS)
        ]

    def _bring_back(self, place: RunPlace, site: str, struck: int) -> None:
        """Start a site again: once a round has closed without it, or where none can, soon."""
        until = time.monotonic() + AWAY_S
        alone = self.made.kind == "private"
        while not place.submission().over and (
            place.completed_rounds() <= struck if alone else time.monotonic() < until
        ):
            time.sleep(0.2)
        self.made.start_site(site)

    def _rejoined(self, place: RunPlace, site: str) -> bool:
        """Whether a site counts in the last round, or, nobody having touched it, in a run that follows."""
        if ROUNDS in rounds_of(place, site):
            return True
        self.made.federation.wait_until_connected()
        self._number += 1
        after = self.made.submit(f"after-{self._number}")
        self.made.wait_until_over(after)
        return ROUNDS in rounds_of(after, site)
