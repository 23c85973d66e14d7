"""Replies fetched apart, by Flower's own grid: the wire below it alone is made up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, MessageType
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from common.flower_records import from_records, to_records
from server.downloads import DownloadingGrid, downloading
from server.transport import Exchange
from simulations.flower_internals import identify_process
from tests.server.test_transport import Seconds, Trickle


class Wire:
    """A SuperLink's answers: announced replies, once each, and of their parts those that were uploaded."""

    def __init__(self) -> None:
        self.announced: list[tuple[Message, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.lost, self.pulls, self.requests = False, 0, list[str]()

    def reply(self, name: str, *, uploaded: bool) -> tuple[str, Callable[[], None]]:
        """Announce a reply; return the id of what it answers, and what uploads its parts."""
        request = Message(to_records(b"{}"), 1, MessageType.TRAIN, group_id=name)
        request.metadata.__dict__["_message_id"] = name
        reply = Message(to_records(name.encode(), b"payload"), reply_to=request)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.announced.append((reply, get_object_tree(reply)))
        parts = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}

        def upload() -> None:
            self.uploaded |= parts

        if uploaded:
            upload()
        return name, upload

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        self.requests += request.message_ids
        given = [one for one in self.announced if one[0].metadata.reply_to_message_id in request.message_ids]
        self.announced = [one for one in self.announced if one not in given]
        protos = [message_to_proto(reply) for reply, _ in given]
        for proto in protos:
            proto.ClearField("content")
        return PullAppMessagesResponse(messages_list=protos, message_object_trees=[tree for _, tree in given])

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802 - Flower's name
        self.pulls += 1
        content = self.uploaded.get(request.object_id)
        return PullObjectResponse(
            object_found=not self.lost, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, _request: Any) -> None:  # noqa: N802 - Flower's name
        """Nothing is kept."""


@pytest.fixture
def wire() -> Wire:
    identify_process()
    return Wire()


@pytest.fixture
def grid(wire: Wire) -> DownloadingGrid:
    http = HttpGrid(token="x")
    http._client = wire  # type: ignore[assignment]
    http._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
    return DownloadingGrid(http)


def names(messages: list[Message]) -> list[str]:
    return [from_records(message.content)[0].decode() for message in messages]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stalled_upload_holds_up_no_other_reply(wire: Wire, grid: DownloadingGrid) -> None:
    stalled, upload = wire.reply("a", uploaded=False)
    wire.reply("b", uploaded=True)
    wire.reply("c", uploaded=True)
    came: list[str] = []
    until(lambda: came.extend(names(grid.pull_messages(["a", "b", "c"]))) or len(came) == 2)  # type: ignore[func-returns-value]
    assert sorted(came) == ["b", "c"]
    assert grid.pull_messages([stalled]) == []
    upload()
    until(lambda: bool(came.extend(names(grid.pull_messages([stalled])))) or "a" in came)  # type: ignore[func-returns-value]
    assert wire.requests.count("a") == 1  # what was announced is asked for no more
    assert grid.pull_messages([stalled]) == []


def test_upload_that_is_given_up_becomes_an_error_reply(wire: Wire, grid: DownloadingGrid) -> None:
    stalled, _ = wire.reply("a", uploaded=False)
    assert grid.pull_messages([stalled]) == []
    wire.lost = True
    found: list[Message] = []
    until(lambda: bool(found.extend(grid.pull_messages([stalled]))) or bool(found))  # type: ignore[func-returns-value]
    assert found[0].has_error()
    assert found[0].metadata.reply_to_message_id == stalled


def test_reply_that_nobody_asks_for_now_waits_for_who_will(wire: Wire, grid: DownloadingGrid) -> None:
    one, other = wire.reply("a", uploaded=True)[0], wire.reply("b", uploaded=True)[0]
    grid.pull_messages([one])
    assert names(grid.pull_messages([other])) == ["b"]


def test_forgotten_reply_is_fetched_no_more(wire: Wire, grid: DownloadingGrid) -> None:
    stalled, upload = wire.reply("a", uploaded=False)
    whole, _ = wire.reply("b", uploaded=True)
    before = threading.active_count()
    grid.pull_messages([stalled])
    until(lambda: wire.pulls > 0)
    grid.forget([stalled])
    until(lambda: threading.active_count() <= before)  # no thread is left that this process would wait for
    upload()
    assert grid.pull_messages([stalled]) == []
    assert names(grid.pull_messages([whole])) == ["b"]


def test_exchange_tells_the_grid_what_it_forgets(wire: Wire, grid: DownloadingGrid) -> None:
    stalled, _ = wire.reply("a", uploaded=False)
    clock = Seconds()
    under_way: Exchange[str] = Exchange(grid, clock)
    under_way._waiting = {stalled: "site"}
    assert under_way.receive(1.0) is None
    under_way.forget({"site"})
    assert grid._forgotten == {stalled}


def test_grid_of_this_process_is_left_as_it_is() -> None:
    own = Trickle(Seconds(), {})
    with downloading(own) as grid:
        assert grid is own
    with downloading(HttpGrid(token="x")) as apart:
        assert isinstance(apart, DownloadingGrid)
