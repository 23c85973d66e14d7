"""``python -m client.supervise.supernode``: Flower's SuperNode, with its options, as a site runs it.

Two things are added, since a site must come back by itself:

- Whatever was connected with the site's key before is signed off first (``client.supervise.sign_off``). Where that does
  not work, Flower refuses the new one until a minute after the dead one's last heartbeat, and it is tried again.
- Flower's SuperNode works on one message at a time and waits for the reply of its ClientApp for ever, also where the
  ClientApp died before it had taken the message or handed all of the reply over. It ends then, and is started again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from client.supervise.sign_off import sign_off
from common.errors import ConfigError

logger = logging.getLogger(__name__)

SEEN_S = 4.0
"""Seconds between signing off and connecting anew: a coordinator that waits for this site looks more often."""
POLL_S, DEAF_LOOKS = 1.0, 5
"""Seconds between looks at a SuperNode, and looks in a row after which one that waits in vain is ended."""
_AT_WORK = (Status.PENDING, Status.STARTING, Status.RUNNING)


def is_deaf(state: Any, store: Any) -> bool:
    """Whether a SuperNode waits for a reply that no ClientApp can give any more.

    Args:
        state: Flower's, of the messages and the ClientApps that work on them.
        store: Flower's, of the parts of messages.
    """
    with state.lock_msg_store:
        messages = [entry.message for entry in state.msg_store.values()]
    replies = [message for message in messages if message.metadata.reply_to_message_id]
    if len(messages) == len(replies) or state.get_tasks(statuses=_AT_WORK):
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
        except (KeyError, ValueError):  # a message was deleted meanwhile
            deaf = 0
    end()


def main() -> None:
    """Sign off what was connected before, then run Flower's SuperNode until it is ended."""
    logger.addHandler(logging.StreamHandler())  # Flower's own handler shows the rest
    logger.propagate = False
    options, known = sys.argv[1:], Path(os.environ["FLWR_HOME"]) / "node-id"
    try:
        key = _key(Path(_option(options, "--auth-supernode-private-key")))
        if sign_off(_option(options, "--superlink"), Path(_option(options, "--root-certificates")), key, known):
            logger.warning("the SuperNode before this one was still connected; it is signed off")
            time.sleep(SEEN_S)
    except (httpx.HTTPError, ConfigError, OSError, ValueError) as error:
        logger.warning("nothing could be signed off (%s)", type(error).__name__)
    flower: Any = import_module("flwr.supernode.cli.flower_supernode")  # its package has a function of that name
    start = flower.start_client_internal

    def start_watched(**settings: Any) -> None:
        factory = settings["state_factory"]
        arguments = (factory.state(), factory.objectstore_factory.store(), _end)
        threading.Thread(target=watch, args=arguments, daemon=True).start()
        start(**settings)

    flower.start_client_internal = start_watched
    flower.flower_supernode()


def _end() -> None:
    logger.warning("a ClientApp died without a reply; the SuperNode ends, to be started again")
    sys.stderr.flush()
    os._exit(1)  # the thread that waits could not be ended otherwise


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the site's key where Flower reads it: under systemd that is a credential, with other permissions."""
    key = load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no EC key; expected the one that fedtune-client init made. Restore it.")
    return key


def _option(options: Sequence[str], name: str) -> str:
    return options[options.index(name) + 1]


if __name__ == "__main__":
    main()
