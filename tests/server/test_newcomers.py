"""Sites that come in between rounds: asked without waiting, checked as those at the start, asked again seldom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.flower_records import from_records, to_records
from common.wire import DescribeRequest, Refusal, header_bytes, parse_header
from server.cohort import admit_members
from server.newcomers import AGAIN_S, Newcomers
from simulations.flower_internals import identify_process
from tests.server.test_rounds import BASE, OTHER, description
from tests.server.test_transport import Seconds

ENROLLED = {1: "one", 2: "two", 3: "three"}


class Site(Grid):  # type: ignore[misc]
    """Nodes that are connected, and what each says when it is asked what it is."""

    def __init__(self, says: dict[int, bytes]) -> None:
        self.says, self.connected, self.asked = says, set[int](), list[int]()
        self._sent: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return sorted(self.connected)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            assert isinstance(parse_header(from_records(message.content)[0], DescribeRequest), DescribeRequest)
            self.asked.append(node)
            message.metadata.__dict__["_message_id"] = f"{node}, {len(self.asked)}"
            self._sent[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [key for key in message_ids if self._sent[key].metadata.dst_node_id in self.says]
        return [
            Message(to_records(self.says[sent.metadata.dst_node_id]), reply_to=sent)
            for sent in (self._sent.pop(key) for key in ready)
        ]

    def set_run(self, run: Any) -> None: ...
    def run(self) -> Any: ...  # type: ignore[override]
    def create_message(self, *_: Any, **__: Any) -> Any: ...
    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...


@pytest.fixture
def clock() -> Seconds:
    identify_process()
    return Seconds()


def newcomers(config: RunConfig, clock: Seconds) -> Newcomers:
    return Newcomers(config, clock, ENROLLED, lambda come: admit_members(come, config, BASE, OTHER, ENROLLED))


def test_site_that_connects_later_is_asked_once_and_comes_in(
    make_config: Callable[..., RunConfig], clock: Seconds
) -> None:
    grid, others = Site({}), newcomers(make_config(), clock)
    members = {"one"}
    grid.connected = {1, 2}
    assert others.come(grid, members) == {}
    assert grid.asked == [2]  # not the member, nor one that is away; and nobody waited for the answer
    clock.time_s += 5
    assert others.come(grid, members) == {}
    assert grid.asked == [2]
    grid.says = {2: header_bytes(description("two"))}
    come = others.come(grid, members)
    assert (list(come), come["two"].node_id) == (["two"], 2)
    clock.time_s += 10 * AGAIN_S
    assert others.come(grid, members | set(come)) == {}
    assert grid.asked == [2]


@pytest.mark.parametrize(
    "answer",
    [
        header_bytes(Refusal(code="policy", place="")), header_bytes(description("three")), b"junk",
        header_bytes(description("two", base_fingerprint="c" * 64)),
    ],
    ids=["refused", "another's name", "malformed", "other base"],
)  # fmt: skip
def test_site_that_is_not_fit_stays_out_and_is_asked_again_ever_more_seldom(
    make_config: Callable[..., RunConfig], clock: Seconds, answer: bytes
) -> None:
    grid, others = Site({2: answer}), newcomers(make_config(), clock)
    grid.connected = {1, 2}
    while clock.time_s < 10 * AGAIN_S:
        assert others.come(grid, {"one"}) == {}
        clock.time_s += 5
    assert len(grid.asked) == 4  # at 0, 60, 180, 420 s
    grid.says = {2: header_bytes(description("two"))}
    clock.time_s += 10 * AGAIN_S
    others.come(grid, {"one"})
    assert list(others.come(grid, {"one"})) == ["two"]
