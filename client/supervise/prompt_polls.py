"""A SuperNode asks for the next message soon after it answered one, and seldom while nothing is going on.

Flower's SuperNode sleeps 3 s whenever there is no message for it, and has no setting for that. In a run the next one is
made while it sleeps: of a round without much training, that sleep is a large part. A site that has been quiet for a
while asks as seldom as Flower's, so that sites without a run cost the coordinator no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

PROMPT_S = 0.5
"""Most seconds between two questions for a message while a run is going on."""
QUIET_S = 60.0
"""Seconds since the last answer after which no run is thought to be going on."""


class PromptSleep:
    """Sleeps as asked, but at most :data:`PROMPT_S` within :data:`QUIET_S` of the last answer.

    Args:
        sleep: what sleeps, in seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._last: float | None = None

    def answered(self) -> None:
        """Note that a message has been answered now, however long that took."""
        self._last = self._clock()

    def __call__(self, seconds: float) -> None:
        """Sleep, for ``seconds`` at most."""
        prompt = self._last is not None and self._clock() - self._last < QUIET_S
        self._sleep(min(seconds, PROMPT_S) if prompt else seconds)


def poll_promptly() -> None:
    """Have a SuperNode that is started in this process later sleep so."""
    loop: Any = import_module("flwr.supernode.start_client_internal")
    push, sleep = loop._push_messages, PromptSleep()

    def push_noted(**settings: Any) -> None:
        """Wait for the reply and send it, as Flower's does."""
        push(**settings)
        sleep.answered()

    loop._push_messages = push_noted
    loop.time = SimpleNamespace(sleep=sleep)
