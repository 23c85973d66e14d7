"""Ends a SuperNode that waits for a reply which cannot come, so that it is started again.

Flower's SuperNode works on one message at a time and waits for the reply of its ClientApp for ever, also where the
ClientApp died before it had taken the message or handed all of the reply over. To the coordinator such a site looks
alive, and answers nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError

logger = logging.getLogger(__name__)

POLL_S, DEAF_LOOKS = 1.0, 5
"""Seconds between looks at a SuperNode, and looks in a row after which one that waits in vain is ended."""
AT_WORK = (Status.PENDING, Status.STARTING, Status.RUNNING)
"""What the task of a ClientApp is while it may still answer."""


def is_deaf(state: Any, store: Any) -> bool:
    """Whether a SuperNode waits for a reply that no ClientApp can give any more.

    Args:
        state: Flower's, of the messages and the ClientApps that work on them.
        store: Flower's, of the parts of messages.
    """
    with state.lock_msg_store:
        messages = [entry.message for entry in state.msg_store.values()]
    replies = [message for message in messages if message.metadata.reply_to_message_id]
    if len(messages) == len(replies) or state.get_tasks(statuses=AT_WORK):
        return False
    return not all(_is_whole(reply.metadata.message_id, store) for reply in replies) or not replies


def _is_whole(reply: str, store: Any) -> bool:
    tree = store.get_object_tree(reply)
    return all(store.get(part.object_id) != b"" for part in iterate_object_tree(tree))


def watch(state: Any, store: Any, end: Callable[[], None], poll_s: float = POLL_S) -> None:
    """Call ``end`` once the SuperNode was deaf at ``DEAF_LOOKS`` looks in a row; until then do not return."""
    deaf = 0
    while deaf < DEAF_LOOKS:
        time.sleep(poll_s)
        try:
            deaf = deaf + 1 if is_deaf(state, store) else 0
        except NoObjectInStoreError:  # a message was deleted meanwhile
            deaf = 0
    end()


def end_when_deaf() -> None:
    """Have this process end once its SuperNode, which is started later, is deaf."""
    flower: Any = import_module("flwr.supernode.cli.flower_supernode")  # its package has a function of that name
    start = flower.start_client_internal

    def start_watched(**settings: Any) -> None:
        factory = settings["state_factory"]
        arguments = (factory.state(), factory.objectstore_factory.store(), _end)
        threading.Thread(target=watch, args=arguments, daemon=True).start()
        start(**settings)

    flower.start_client_internal = start_watched


def _end() -> None:
    logger.warning("a ClientApp died without a reply; the SuperNode ends, to be started again")
    sys.stderr.flush()
    os._exit(1)  # the thread that waits could not be ended otherwise
