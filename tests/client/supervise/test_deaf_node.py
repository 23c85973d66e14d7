"""When a SuperNode waits for what cannot come: Flower's own state, led through the deaths of a ClientApp."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory

from client.supervise.deaf_node import DEAF_LOOKS, is_deaf, watch
from simulations.flower_internals import identify_process

RUN = 1


class Node:
    """The state of a SuperNode that has taken one message."""

    def __init__(self) -> None:
        identify_process()
        stores = ObjectStoreFactory()
        self.store, self.state = stores.store(), NodeStateFactory(stores).state()
        self.state.set_node_id(3)
        self.message = Message(RecordDict({"asked": ConfigRecord({"n": 1})}), 3, "train")
        self.message.metadata.__dict__["_message_id"] = "asked"
        task = self.state.create_task(TaskType.CLIENT_APP, RUN)
        assert task is not None
        self.task = task
        self.state.store_message(self.message)

    @property
    def deaf(self) -> bool:
        return is_deaf(self.state, self.store)

    def work(self) -> None:
        assert self.state.claim_task(self.task) is not None
        assert self.state.activate_task(self.task)

    def reply(self, *, whole: bool) -> None:
        reply = Message(RecordDict({"answer": ConfigRecord({"n": 2})}), reply_to=self.message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.store.preregister(RUN, get_object_tree(reply))
        parts = get_all_nested_objects(reply)
        for name in parts if whole else list(parts)[:-1]:
            self.store.put(name, parts[name].deflate())
        self.state.store_message(reply)

    def finish(self, status: str) -> None:
        assert self.state.finish_task(self.task, status, "")


@pytest.fixture
def node() -> Node:
    return Node()


def test_supernode_hears_while_its_clientapp_is_to_come_or_works(node: Node) -> None:
    assert not node.deaf
    node.work()
    assert not node.deaf
    node.reply(whole=False)  # it goes up to the SuperNode right now
    assert not node.deaf


def test_whole_reply_may_take_its_time_upwards(node: Node) -> None:
    node.work()
    node.reply(whole=True)
    node.finish(SubStatus.COMPLETED)
    assert not node.deaf


@pytest.mark.parametrize("replied", [False, True])
def test_supernode_is_deaf_once_its_clientapp_died(node: Node, replied: bool) -> None:
    node.work()
    if replied:
        node.reply(whole=False)
    node.finish(SubStatus.FAILED)
    assert node.deaf
    node.state.delete_messages()
    assert not node.deaf


@dataclass
class Changing:
    """Deaf at every look but the second."""

    node: Node
    looks: int = 0

    @property
    def lock_msg_store(self) -> object:
        self.looks += 1
        return self.node.state.lock_msg_store  # type: ignore[attr-defined]

    @property
    def msg_store(self) -> dict[str, object]:
        return {} if self.looks == 2 else self.node.state.msg_store  # type: ignore[attr-defined]

    def get_tasks(self, statuses: object) -> list[object]:
        return []


def test_watch_ends_what_stays_deaf(node: Node) -> None:
    node.work()
    node.finish(SubStatus.FAILED)
    state, ended = Changing(node), threading.Event()
    watch(state, node.store, ended.set, poll_s=0.01)
    assert ended.is_set()
    assert state.looks == 2 + DEAF_LOOKS
