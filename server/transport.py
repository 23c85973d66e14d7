"""The edge to Flower's Grid: messages out, replies as they arrive, whoever carries them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.flower_records import from_records, to_records
from common.wire import DescribeRequest, Refusal, SiteDescription, header_bytes, parse_header
from server.clock import POLL_S, Clock, WallClock

logger = logging.getLogger(__name__)

DESCRIBED_AT_ONCE = 256
"""Sites whose requests and replies are held at any time before the first round."""


def exchange(
    grid: Grid, messages: Mapping[str, Message], timeout_s: float, clock: Clock | None = None
) -> Iterator[tuple[str, Message]]:
    """Send messages and yield (key, reply) as soon as each is there, until all came or ``timeout_s`` passed.

    Flower's own ``send_and_receive`` waits for the last reply and holds them all; this holds one. Replies are matched
    by the message they answer: an error reply of a lost node names another sender. Time runs out only while nothing
    arrives, so that a grid that computes in this process, site after site, never loses one to the clock.

    Args:
        grid: what carries the messages.
        messages: by a key of the caller's.
        timeout_s: seconds of ``clock``.
        clock: the wall's if not given.
    """
    sent = list(grid.push_messages(messages.values()))
    waiting = dict(zip(sent, messages, strict=True))
    timer = WallClock() if clock is None else clock
    deadline = timer.now() + timeout_s
    while waiting:
        replies = list(grid.pull_messages(waiting.keys()))
        for reply in replies:
            key = waiting.pop(reply.metadata.reply_to_message_id, None)
            if key is not None:
                yield key, reply
            else:
                logger.warning("node %d answered a message a second time; ignored", reply.metadata.src_node_id)
        if not replies:
            if timer.now() >= deadline:
                return
            timer.wait(deadline)


def wait_for_nodes(grid: Grid, config: RunConfig) -> list[int]:
    """Return the ids of the nodes that are connected, once there are ``federation.min_sites``.

    Raises:
        RunError: if they do not come within ``federation.join_timeout_s``.
    """
    deadline = time.monotonic() + config.federation.join_timeout_s
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= config.federation.min_sites:
            return nodes
        if time.monotonic() >= deadline:
            raise RunError(
                f"{len(nodes)} sites are connected after {config.federation.join_timeout_s:g} s; expected at least "
                f"{config.federation.min_sites} (federation.min_sites). Start the missing sites."
            )
        time.sleep(POLL_S)


def describe_sites(
    grid: Grid, nodes: Sequence[int], config: RunConfig
) -> tuple[dict[int, SiteDescription], dict[int, str]]:
    """Ask every node to describe itself.

    Returns:
        The descriptions by node id, and the reasons of the nodes that are left out since theirs is no valid one: an
        honest site sends none such, so that one hostile site cannot keep the others from running.

    Raises:
        RunError: for a node that refuses, fails or does not answer in time, or with fewer usable descriptions than
            ``federation.min_sites``.
    """
    header = header_bytes(DescribeRequest(config_digest=config.digest()))
    described: dict[int, SiteDescription] = {}
    left_out: dict[int, str] = {}
    for start in range(0, len(nodes), DESCRIBED_AT_ONCE):
        asked = nodes[start : start + DESCRIBED_AT_ONCE]
        messages = {
            str(node): Message(to_records(header), node, MessageType.QUERY, group_id="describe") for node in asked
        }
        for node, reply in exchange(grid, messages, config.federation.join_timeout_s):
            try:
                described[int(node)] = _description(reply)
            except WireError as error:
                left_out[int(node)] = str(error)
                logger.warning("node %s is left out: its description was not usable: %s", node, error)
        if len(described) + len(left_out) < start + len(asked):
            break
    silent = len(nodes) - len(described) - len(left_out)
    if silent:
        raise RunError(
            f"{silent} of {len(nodes)} sites did not describe themselves within "
            f"{config.federation.join_timeout_s:g} s; expected all. Check their logs."
        )
    if len(described) < config.federation.min_sites:
        first = next(iter(left_out.values()))
        raise RunError(
            f"{len(described)} sites described themselves usably; expected at least {config.federation.min_sites} "
            f"(federation.min_sites). First of {len(left_out)} left out: {first}"
        )
    return described, left_out


def _description(reply: Message) -> SiteDescription:
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
