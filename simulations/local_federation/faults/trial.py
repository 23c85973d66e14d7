"""Faults one after the other in the middle of a run, and what became of each and of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from common.errors import RunError
from server.run_place import RunPlace
from simulations.local_federation.commands import WAIT_S
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
from simulations.local_federation.faults.disturbed import DEADLINE_S, Disturbed
from simulations.local_federation.faults.kinds import FAULTS

BACK_S, BACK_ROUNDS = 120.0, 3
"""A site comes back within so many seconds or rounds; whether in a run that follows is looked at in shorter ones."""
AWAY_S = 5.0
"""Seconds that a site is away where no round goes on without it."""
_LOOK_S = 0.1


@dataclass(frozen=True)
class Trial:
    """What became of one fault. Faults of one run share what only the whole run can tell.

    Attributes:
        kind: of the fault.
        federation: "plain" or "private".
        site: that was hit; None where it was the coordinator.
        moment_s: seconds from the run's submission to the kill.
        round: that was in progress; 1 also before the first began.
        ended: how the run ended.
        rounds_repeated: rounds that were begun again because of this fault.
        same_bits: whether the run's adapter has the bits of the undisturbed run; None with privacy.
        budgets: what is wrong with ledgers after the run; None without them.
        in_time: whether the rounds from the kill until the federation was whole again closed by their deadline; None
            where the coordinator itself was away.
        rejoined: whether the site was heard again, by itself; every site, where it was the coordinator.
        seconds: from the kill until the federation was whole again.
    """

    kind: str
    federation: str
    site: str | None
    moment_s: float
    round: int
    ended: str
    rounds_repeated: int
    same_bits: bool | None
    budgets: list[str] | None
    in_time: bool | None
    rejoined: bool
    seconds: float

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
    """Runs of one federation, each with several faults.

    Attributes:
        made: the federation.
        adapter: of the undisturbed run.
        round_s: seconds that one of its rounds took, the start of the run shared out.
    """

    made: Disturbed
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)
    round_s: float = 0.0
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
        self.adapter, self.round_s = adapter_of(place), (time.monotonic() - began) / self.made.rounds

    def run_with(self, faults: Sequence[tuple[str, np.random.Generator]]) -> list[Trial]:
        """Run once, and kill one thing after the other at random moments of it.

        The next fault comes once the federation is whole again after the last, and up to a round later.

        Args:
            faults: the kind of each, and what its moment and its site are drawn by.

        Returns:
            What became of each fault, in order; fewer than ``faults`` if the run was over before the last.

        Raises:
            RunError: if the run makes no progress.
        """
        made, before = self.made, self._ledgers()
        self._number += 1
        place, began, struck = made.submit(f"disturbed-{self._number}"), time.monotonic(), list[Trial]()
        for kind, draw in faults:
            self._pause(place, float(draw.uniform(0.0, self.round_s)))
            trial = self._strike(place, kind, str(draw.choice(sorted(made.sites))), began)
            if trial is None:
                break
            struck.append(trial)
        ended = made.wait_until_over(place)
        if not each_round_once(place, made.rounds):
            ended = f"{ended}, with rounds {place.completed_rounds()}"
        plain = made.kind == "plain"
        bits = same_bits(adapter_of(place), self.adapter) if plain and ended == "completed" else None
        budgets = None if plain else self._wrong_budgets(before, place)
        return [
            replace(
                trial, ended=ended, same_bits=bits, budgets=budgets,
                rejoined=trial.rejoined or (self._was_short(trial) and self._come_back(trial.site)),
            )
            for trial in struck
        ]  # fmt: skip

    def _strike(self, place: RunPlace, kind: str, site: str, began: float) -> Trial | None:
        """Kill, and wait until the federation is whole again; None if the run was over before.

        Whole is: a round is closed that began after the kill, with the site that was hit, or with every site.
        """
        made, fault = self.made, FAULTS[kind]
        repeated = rounds_repeated(place, made.sites.values())
        if not fault.strike(made, place, site):
            return None
        moment, done = time.monotonic(), place.completed_rounds()
        if kind == "site":
            self._bring_back(place, site, done)
        self._wait(place, lambda: place.completed_rounds() > done + 1)
        hit = [site] if fault.at_site else sorted(made.sites)
        self._wait(place, lambda: self._count_after(place, hit, done + 1))
        return Trial(
            kind=kind,
            federation=made.kind,
            site=site if fault.at_site else None,
            moment_s=round(moment - began, 1),
            round=done + 1,
            ended="",
            rounds_repeated=rounds_repeated(place, made.sites.values()) - repeated,
            same_bits=None,
            budgets=None,
            in_time=closed_in_time(place, DEADLINE_S[made.kind], done + 1) if fault.at_site else None,
            rejoined=self._count_after(place, hit, done + 1),
            seconds=round(time.monotonic() - moment, 1),
        )

    def _pause(self, place: RunPlace, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(place, lambda: time.monotonic() >= until)

    def _wait(self, place: RunPlace, holds: Callable[[], bool]) -> None:
        """Wait until something holds or the run is over.

        Raises:
            RunError: if it takes too long.
        """
        until = time.monotonic() + WAIT_S
        while not holds() and not place.submission().over:
            if time.monotonic() > until:
                raise RunError(
                    f"run {place.name!r} makes no progress in {WAIT_S:g} s; expected some. Look at the logs."
                )
            time.sleep(_LOOK_S)

    def _ledgers(self) -> dict[str, Entries]:
        private = self.made.kind == "private"
        return {site: entries_of(places) for site, places in self.made.sites.items()} if private else {}

    def _wrong_budgets(self, before: dict[str, Entries], place: RunPlace) -> list[str]:
        after = self._ledgers()
        return [
            f"{site}: {wrong}"
            for site in before
            for wrong in budget_is_right(before[site], after[site], place, site, self.made.rounds)
        ]

    def _bring_back(self, place: RunPlace, site: str, done: int) -> None:
        """Start a site again: once a round has closed without it, or where none can, soon."""
        if self.made.kind == "private":
            self._wait(place, lambda: place.completed_rounds() > done)
        else:
            self._pause(place, AWAY_S)
        self.made.start_site(site)

    @staticmethod
    def _count_after(place: RunPlace, sites: Sequence[str], number: int) -> bool:
        return all(max(rounds_of(place, site), default=0) > number for site in sites)

    def _was_short(self, trial: Trial) -> bool:
        """Whether the run left a site no time to come back."""
        return trial.seconds < BACK_S or self.made.rounds - trial.round < BACK_ROUNDS

    def _come_back(self, site: str | None) -> bool:
        """Whether the site that was hit, or every site, nobody having touched it, counts in a run that follows."""
        self.made.federation.wait_until_connected()
        self._number += 1
        place = self.made.submit(f"after-{self._number}")
        self.made.wait_until_over(place)
        hit = sorted(self.made.sites) if site is None else [site]
        return self._count_after(place, hit, self.made.rounds - 1)
