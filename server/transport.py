"""The edge to Flower's Grid: messages out, replies as they arrive, whoever carries them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.flower_records import from_records, to_records
from common.wire import DescribeRequest, Refusal, SiteDescription, header_bytes, parse_header
from server.clock import POLL_S, Clock, WallClock
from server.forwarding_grid import ForwardingGrid

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

EXPIRES_AFTER_S = 10.0
"""Seconds after its last deadline until a message that no site has taken is not delivered any more."""

RETURN_S = 30.0
"""Seconds that a run that goes on waits for the sites it had: they come back after what ended it ended them too."""
DESCRIBED_AT_ONCE = 256
"""Sites whose requests and replies are held at any time before the first round."""


class Exchange(Generic[Key]):
    """Messages on their way, and the replies to them as they arrive.

    Flower's own ``send_and_receive`` waits for the last reply and holds them all; this holds one pull's. Replies are
    matched by the message they answer: an error reply of a lost node names another sender.

    Args:
        grid: what carries the messages.
        clock: what deadlines are read from.
    """

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid, self._clock = grid, clock
        self._waiting: dict[str, Key] = {}
        self._arrived: deque[tuple[Key, Message]] = deque()

    def send(self, messages: Mapping[Key, Message]) -> None:
        """Send messages, each by a key of the caller's that is not under way."""
        sent = list(self._grid.push_messages(messages.values()))
        self._waiting |= dict(zip(sent, messages, strict=True))

    def under_way(self) -> set[Key]:
        """Return the keys of the messages whose replies were not received yet."""
        return {*self._waiting.values(), *(key for key, _ in self._arrived)}

    def forget(self, keys: Collection[Key]) -> None:
        """Ask no more for the replies to some messages."""
        if isinstance(self._grid, ForwardingGrid):
            self._grid.forget([sent for sent, key in self._waiting.items() if key in keys])
        self._waiting = {sent: key for sent, key in self._waiting.items() if key not in keys}
        self._arrived = deque((key, reply) for key, reply in self._arrived if key not in keys)

    def receive(self, deadline: float) -> tuple[Key, Message] | None:
        """Return the next reply with the key of its message, or None once nothing is under way or the deadline passed.

        What had arrived with a reply that was in time counts as in time; there is one last look at the deadline.

        Args:
            deadline: in the clock's seconds, which bind also while replies trickle in.
        """
        if not self._arrived and self._clock.now() > deadline:
            return None
        while self._waiting and not self._arrived:
            replies = list(self._grid.pull_messages(self._waiting.keys()))
            for reply in replies:
                key = self._waiting.pop(reply.metadata.reply_to_message_id, None)
                if key is not None:
                    self._arrived.append((key, reply))
                else:
                    logger.warning("node %d answered a message a second time; ignored", reply.metadata.src_node_id)
            if not replies:
                if self._clock.now() >= deadline:
                    return None
                self._clock.wait(deadline)
        return self._arrived.popleft() if self._arrived else None


def exchange(
    grid: Grid, messages: Mapping[Key, Message], timeout_s: float, clock: Clock | None = None
) -> Iterator[tuple[Key, Message]]:
    """Send messages and yield (key, reply) as soon as each is there, until all came or ``timeout_s`` passed.

    Args:
        grid: what carries the messages.
        messages: by a key of the caller's.
        timeout_s: seconds of ``clock``, from now.
        clock: the wall's if not given.
    """
    timer = WallClock() if clock is None else clock
    under_way: Exchange[Key] = Exchange(grid, timer)
    deadline = timer.now() + timeout_s
    under_way.send(messages)
    while (arrived := under_way.receive(deadline)) is not None:
        yield arrived


def wait_for_nodes(grid: Grid, config: RunConfig, awaited: Collection[int] = ()) -> list[int]:
    """Return the ids of the nodes that are connected, once there are ``federation.min_sites``.

    Args:
        grid: what carries the messages.
        config: the run config.
        awaited: nodes that are waited for besides, for :data:`RETURN_S`: those of a run that goes on.

    Raises:
        RunError: if they do not come within ``federation.join_timeout_s``.
    """
    began = time.monotonic()
    while True:
        nodes = sorted(grid.get_node_ids())
        waited = time.monotonic() - began
        if len(nodes) >= config.federation.min_sites and (waited >= RETURN_S or not {*awaited} - {*nodes}):
            return nodes
        if waited >= config.federation.join_timeout_s and len(nodes) < config.federation.min_sites:
            raise RunError(
                f"{len(nodes)} sites are connected after {config.federation.join_timeout_s:g} s; expected at least "
                f"{config.federation.min_sites} (federation.min_sites). Start the missing sites."
            )
        time.sleep(POLL_S)


def describe_sites(
    grid: Grid, nodes: Sequence[int], config: RunConfig, clock: Clock | None = None
) -> tuple[dict[int, SiteDescription], dict[int, str]]:
    """Ask every node to describe itself.

    Args:
        grid: what carries the messages.
        nodes: ids of the nodes.
        config: the run config.
        clock: what the time that a node has is read from; the wall's if not given.

    Returns:
        The descriptions by node id, and the reasons of the nodes that refuse, fail, do not answer within
        ``federation.join_timeout_s`` or send no valid one: one broken or hostile site cannot keep the others from
        running.
    """
    described: dict[int, SiteDescription] = {}
    left_out: dict[int, str] = {}
    for start in range(0, len(nodes), DESCRIBED_AT_ONCE):
        asked = nodes[start : start + DESCRIBED_AT_ONCE]
        messages = {str(node): description_request(node, config) for node in asked}
        for node, reply in exchange(grid, messages, config.federation.join_timeout_s, clock):
            try:
                described[int(node)] = description_of(reply)
            except WireError as error:
                left_out[int(node)] = f"its description is not usable: {error}"
            except RunError as error:
                left_out[int(node)] = str(error)
        silent = [node for node in asked if node not in described and node not in left_out]
        left_out |= dict.fromkeys(
            silent,
            f"a site did not describe itself within {config.federation.join_timeout_s:g} s; expected an answer. "
            "Check its log.",
        )
    return described, left_out


def description_request(node: int, config: RunConfig) -> Message:
    """Return the question to a node what it is. It expires: nobody waits for a late answer."""
    header = header_bytes(DescribeRequest(config_digest=config.digest()))
    seconds = config.federation.join_timeout_s
    return Message(to_records(header), node, MessageType.QUERY, ttl=seconds + EXPIRES_AFTER_S, group_id="describe")


def description_of(reply: Message) -> SiteDescription:
    """Return what a site says of itself.

    Raises:
        RunError: for a site that failed or refuses.
        WireError: for an answer that is none.
    """
    if reply.has_error():
        raise RunError(f"a site failed before the first round (Flower error {reply.error.code}). See its log.")
    header, _ = from_records(reply.content)
    description = parse_header(header, SiteDescription)
    if isinstance(description, Refusal):
        raise RunError(
            f"a site refused to take part: {description.code!r} at {description.place or 'unknown'}. "
            "The reason is in that site's log."
        )
    return description
