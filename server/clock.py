"""The clock that deadlines are read from: the wall's, unless whoever carries the messages brings another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

POLL_S, REST_S = 0.2, 1.0

AGAIN_S = 10.0
"""Seconds until sites that failed are asked again, in a round that is extended or in the one after a skipped round;
twice as long every time, up to the end of what the round was given."""


class Clock(Protocol):
    """Time as the coordinator sees it."""

    def now(self) -> float:
        """Return seconds from some fixed moment."""

    def wait(self, deadline: float) -> None:
        """Return when something may have arrived, at the latest when :meth:`now` is ``deadline``."""

    def rest(self, until: float) -> None:
        """Let some time pass, up to ``until``, while nobody is at work."""


class Connected(Protocol):
    """What a pause looks at, so that a run that was stopped does not sleep on: the Grid."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected."""


def pause(grid: Connected, clock: Clock, until: float, ends: Callable[[], bool] = lambda: False) -> None:
    """Rest until a clock shows ``until``, or the run is to end.

    It keeps calling the grid meanwhile: only there is a run stopped.
    """
    while clock.now() < until and not ends():
        list(grid.get_node_ids())
        clock.rest(until)


class WallClock:
    """Real seconds; waits by sleeping."""

    def now(self) -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic()

    def wait(self, deadline: float) -> None:
        """Sleep for the time between two polls."""
        time.sleep(min(POLL_S, max(0.0, deadline - self.now())))

    def rest(self, until: float) -> None:
        """Sleep for a second."""
        time.sleep(min(REST_S, max(0.0, until - self.now())))


class IdleClock:
    """The seconds spent waiting and no others, for a Grid that computes while it is asked for replies.

    The virtual sites of a simulation share this process or a few workers, site after site: what they take together is
    no site's delay, and none may be lost to it.
    """

    def __init__(self) -> None:
        self._waited_s = 0.0

    def now(self) -> float:
        """Return the seconds waited."""
        return self._waited_s

    def wait(self, deadline: float) -> None:
        """Sleep for the time between two polls, and count it."""
        seconds = min(POLL_S, max(0.0, deadline - self._waited_s))
        time.sleep(seconds)
        self._waited_s += seconds

    def rest(self, until: float) -> None:
        """Count the seconds; nobody sleeps for them."""
        self._waited_s = max(self._waited_s, until)
