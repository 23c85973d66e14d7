"""A SuperNode does not take its next message before it has sent the reply to this one.

Flower's SuperNode takes a message, waits until there is any reply, and sends that. Where a ClientApp died as it handed
its reply over, there are two, the error that Flower makes of its death and its own: the second is left over, and is
taken for the reply to the next message. From then on each reply goes out when the message after it has come, a round
late, until the SuperNode is started again.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


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
