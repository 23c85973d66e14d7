"""A SuperNode does not take its next message before it has sent the reply to this one.

Flower's SuperNode takes a message, waits until there is any reply, and sends that. Where a ClientApp died as it handed
its reply over, there are two, the error that Flower makes of its death and its own: the second is left over, and is
taken for the reply to the next message. From then on each reply goes out when the message after it has come, a round
late, until the SuperNode is started again.

And where a run ends while the parts of its message are fetched, as when the SuperLink is killed, Flower's SuperNode
takes no notice of the message, but leaves it among those to be answered, and its ClientApp waiting for the parts, for
more than an hour: that one is forgotten here, and its ClientApp let go.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flwr.common.constant import SubStatus

from client.supervise.deaf_node import AT_WORK


def questions_of(state: Any) -> set[str]:
    """Return the ids of the messages that a SuperNode has taken and not answered.

    Args:
        state: Flower's, of the messages and the ClientApps that work on them.
    """
    with state.lock_msg_store:
        return {name for name, entry in state.msg_store.items() if not entry.message.metadata.reply_to_message_id}


def answer_in_step() -> None:
    """Have a SuperNode that is started in this process later send replies until its message is answered."""
    loop: Any = import_module("flwr.supernode.start_client_internal")
    push = loop._push_messages

    def push_until_answered(state: Any, **settings: Any) -> None:
        """Wait for replies and send them, as Flower's does, which deletes each with what it answers."""
        asked = questions_of(state)
        push(state=state, **settings)
        while asked & questions_of(state):
            push(state=state, **settings)

    loop._push_messages = push_until_answered
    pull = loop._pull_and_store_message

    def pull_whole(state: Any, object_store: Any, **settings: Any) -> int | None:
        """Take a message, as Flower's does, and forget what it stored of one that it did not take."""
        asked, at_work = questions_of(state), _tasks_of(state)
        run: int | None = pull(state=state, object_store=object_store, **settings)
        if run is None:
            for name in questions_of(state) - asked:
                state.delete_messages(message_ids=[name])
                object_store.delete(name)
            for task in _tasks_of(state) - at_work:
                state.finish_task(task, sub_status=SubStatus.FAILED, details="its message was not received")
        return run

    loop._pull_and_store_message = pull_whole


def _tasks_of(state: Any) -> set[int]:
    return {task.task_id for task in state.get_tasks(statuses=AT_WORK)}
