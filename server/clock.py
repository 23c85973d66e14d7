"""The clock that deadlines are read from: the wall's, unless whoever carries the messages brings another one."""

from __future__ import annotations

import time
from typing import Protocol

POLL_S = 0.2


class Clock(Protocol):
    """Time as the coordinator sees it."""

    def now(self) -> float:
        """Return seconds from some fixed moment."""

    def wait(self, deadline: float) -> None:
        """Return when something may have arrived, at the latest when :meth:`now` is ``deadline``."""


class WallClock:
    """Real seconds; waits by sleeping."""

    def now(self) -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic()

    def wait(self, deadline: float) -> None:
        """Sleep for the time between two polls."""
        time.sleep(min(POLL_S, max(0.0, deadline - self.now())))
