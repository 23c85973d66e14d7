"""How long a SuperNode sleeps between two questions for a message: in Flower's own loop."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from client.supervise.prompt_polls import PROMPT_S, QUIET_S, PromptSleep, poll_promptly


class _Time:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def test_sleeps_are_short_for_a_while_after_an_answer_and_flowers_else() -> None:
    passing = _Time()
    sleep = PromptSleep(passing.sleep, passing.clock)
    sleep(3.0)
    sleep.answered()
    came = passing.now
    while passing.slept[-1] != 3.0 or len(passing.slept) == 1:
        sleep(3.0)
    assert set(passing.slept[1:-1]) == {PROMPT_S}
    assert came + QUIET_S <= passing.now - 3.0 < came + QUIET_S + 2 * PROMPT_S
    sleep.answered()
    sleep(PROMPT_S / 5)
    assert passing.slept[-1] == PROMPT_S / 5


@pytest.fixture
def loop() -> Iterator[Any]:
    module = import_module("flwr.supernode.start_client_internal")
    before = dict(vars(module))
    yield module
    vars(module).update(before)


def test_flowers_loop_asks_again_soon_after_an_answer_that_took_long(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"time", "sleep", "_push_messages"} <= set(loop.start_client_internal.__code__.co_names)
    passing = _Time()
    sleeper = PromptSleep(passing.sleep, passing.clock)
    monkeypatch.setattr("client.supervise.prompt_polls.PromptSleep", lambda: sleeper)
    loop._push_messages = lambda **settings: passing.sleep(10 * QUIET_S)
    poll_promptly()
    loop.time.sleep(3)
    loop._push_messages(state=None)
    loop.time.sleep(3)
    assert passing.slept == [3, 10 * QUIET_S, PROMPT_S]
