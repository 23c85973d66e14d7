"""Replies as they arrive, and deadlines that hold while they trickle in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.flower_records import to_records
from server.clock import IdleClock
from server.transport import Exchange, exchange
from simulations.flower_internals import identify_process


class Seconds:
    """A clock that moves only when told, and by half a second a poll."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now(self) -> float:
        return self.time_s

    def wait(self, deadline: float) -> None:
        self.time_s = min(self.time_s + 0.5, deadline)

    def rest(self, until: float) -> None:
        self.wait(until)


class Trickle(Grid):  # type: ignore[misc]
    """Answers each message at its own time; a pull may take time too."""

    def __init__(self, clock: Seconds, at: dict[str, float], pull_s: float = 0.0) -> None:
        self.clock, self.at, self.pull_s = clock, at, pull_s
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.metadata.group_id
            self.sent[message.metadata.group_id] = message
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.clock.time_s += self.pull_s
        ready = [name for name in message_ids if name in self.sent and self.at[name] <= self.clock.now()]
        return [Message(to_records(b"{}"), reply_to=self.sent.pop(name)) for name in ready]

    def set_run(self, run: Any) -> None: ...
    def run(self) -> Any: ...  # type: ignore[override]
    def create_message(self, *_: Any, **__: Any) -> Any: ...
    def get_node_ids(self) -> Any:
        return []

    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...


def messages(names: Iterable[str]) -> dict[str, Message]:
    identify_process()
    return {name: Message(to_records(b"{}"), 1, MessageType.TRAIN, group_id=name) for name in names}


def test_deadline_counts_from_the_start_also_while_replies_trickle_in() -> None:
    clock = Seconds()
    grid = Trickle(clock, {name: float(place) for place, name in enumerate("abcdefgh")}, pull_s=0.25)
    came = [key for key, _ in exchange(grid, messages("abcdefgh"), 3.0, clock)]
    assert came == ["a", "b", "c", "d"]
    assert clock.now() < 4.0


def test_what_arrives_together_with_a_reply_in_time_counts() -> None:
    clock = Seconds()
    under_way: Exchange[str] = Exchange(Trickle(clock, dict.fromkeys("abc", 1.0)), clock)
    under_way.send(messages("abc"))
    assert under_way.receive(1.0) is not None
    clock.time_s = 100.0
    assert {under_way.receive(1.0)[0], under_way.receive(1.0)[0]} == {"b", "c"}  # type: ignore[index]
    assert under_way.receive(1.0) is None


def test_forgotten_messages_are_asked_for_no_more_and_kept_ones_still_are() -> None:
    clock = Seconds()
    under_way: Exchange[str] = Exchange(Trickle(clock, {"a": 1.0, "b": 5.0, "c": 5.0}), clock)
    under_way.send(messages("abc"))
    assert under_way.receive(2.0)[0] == "a"  # type: ignore[index]
    assert under_way.receive(2.0) is None
    assert under_way.under_way() == {"b", "c"}
    under_way.forget({"b"})
    assert under_way.receive(9.0)[0] == "c"  # type: ignore[index]
    assert under_way.receive(9.0) is None


def test_idle_clock_counts_waiting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("server.clock.time.sleep", slept.append)
    clock = IdleClock()
    assert clock.now() == clock.now() == 0.0
    clock.wait(0.3)
    clock.wait(0.3)
    clock.wait(0.3)
    assert clock.now() == pytest.approx(0.3)
    assert slept == pytest.approx([0.2, 0.1, 0.0])
