"""A reply that is left over does not make a SuperNode answer a message late: Flower's own loop and state."""

from __future__ import annotations

import threading
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import RunNotRunningException

from client.supervise.in_step import answer_in_step, questions_of
from tests.client.supervise.test_deaf_node import RUN, Node

LOOP: Any = import_module("flwr.supernode.start_client_internal")


class Talking(Node):
    """A SuperNode's state, with two messages one after the other, and what it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def take(self, name: str) -> Message:
        message = Message(RecordDict({"asked": ConfigRecord({"n": 1})}), 3, "train")
        message.metadata.__dict__["_message_id"] = name
        self.state.store_message(message)
        return message

    def answer(self, message: Message, number: int) -> None:
        reply = Message(RecordDict({"answer": ConfigRecord({"n": number})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.store.preregister(RUN, get_object_tree(reply))
        for name, part in get_all_nested_objects(reply).items():
            self.store.put(name, part.deflate())
        self.state.store_message(reply)

    def push(self) -> None:
        def send(message: Message, *_: Any) -> tuple[set[str], str]:
            self.sent.append(message.metadata.reply_to_message_id)
            return set(), ""

        state: Any = self.state
        state.get_message_processing_duration = lambda message_id: 1.0
        LOOP._push_messages(state=state, object_store=self.store, send=send, push_object=lambda *_: None)


def answered_once(monkeypatch: pytest.MonkeyPatch, *, patched: bool) -> Talking:
    """A SuperNode, with Flower's loop as it is or patched for this test, whose first message has its answer."""
    for name in ("_push_messages", "_pull_and_store_message"):
        monkeypatch.setattr(LOOP, name, getattr(LOOP, name))  # put back afterwards
    if patched:
        answer_in_step()
    node = Talking()
    node.answer(node.message, 1)
    return node


@pytest.mark.parametrize("patched", [True, False])
def test_message_is_answered_before_the_next_is_taken(monkeypatch: pytest.MonkeyPatch, *, patched: bool) -> None:
    node = answered_once(monkeypatch, patched=patched)
    node.push()
    assert node.sent == ["asked"]
    assert questions_of(node.state) == set()

    node.answer(node.message, 2)  # the second reply to it is left over
    following = node.take("following")
    working = threading.Timer(1.0, node.answer, (following, 3))
    working.start()
    node.push()
    at_once = list(node.sent)
    working.join()
    # Without the patch Flower goes on to its next message here, with this one's answer still to come.
    assert at_once == (["asked", "asked", "following"] if patched else ["asked", "asked"])
    assert questions_of(node.state) == (set() if patched else {"following"})


@pytest.mark.parametrize("patched", [True, False])
def test_message_whose_run_ended_as_it_was_fetched_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, *, patched: bool
) -> None:
    node = answered_once(monkeypatch, patched=patched)
    node.finish(SubStatus.FAILED)
    node.push()

    message = Message(RecordDict({"asked": ConfigRecord({"n": 7})}), 3, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    message.metadata.__dict__["_run_id"] = RUN
    state: Any = node.state
    state.get_run = lambda run_id: SimpleNamespace(primary_task_type="", fab_hash="")

    def ended(run_id: int, name: str) -> bytes:
        raise RunNotRunningException

    taken = LOOP._pull_and_store_message(
        state=state, object_store=node.store, node_config={}, receive=lambda: (message, get_object_tree(message)),
        get_run=None, get_fab=None, pull_object=ended, confirm_message_received=None, trusted_entities=None,
    )  # fmt: skip
    assert taken is None
    left = (set(), []) if patched else ({message.object_id}, [RUN])
    at_work = state.get_tasks(statuses=(Status.PENDING, Status.STARTING, Status.RUNNING))
    assert (questions_of(state), [task.run_id for task in at_work]) == left
