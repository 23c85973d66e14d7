"""The edge to Flower's Grid: messages out, replies as they arrive, whoever carries them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.flower_records import from_records, to_records
from common.wire import DescribeRequest, Refusal, SiteDescription, header_bytes, parse_header

POLL_S = 0.2


def exchange(grid: Grid, messages: Mapping[str, Message], timeout_s: float) -> Iterator[tuple[str, Message]]:
    """Send messages and yield (key, reply) as soon as each is there, until all came or ``timeout_s`` passed.

    Flower's own ``send_and_receive`` waits for the last reply and holds them all; this holds one. Replies are matched
    by the message they answer: an error reply of a lost node names another sender. Time runs out only while nothing
    arrives, so that a grid that computes in this process, site after site, never loses one to the clock.
    """
    sent = list(grid.push_messages(messages.values()))
    waiting = dict(zip(sent, messages, strict=True))
    deadline = time.monotonic() + timeout_s
    while waiting:
        replies = list(grid.pull_messages(waiting.keys()))
        for reply in replies:
            key = waiting.pop(reply.metadata.reply_to_message_id, None)
            if key is not None:
                yield key, reply
        if not replies:
            if time.monotonic() >= deadline:
                return
            time.sleep(POLL_S)


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


def describe_sites(grid: Grid, nodes: Sequence[int], config: RunConfig) -> dict[int, SiteDescription]:
    """Ask every node to describe itself and return the descriptions by node id.

    Raises:
        RunError: for a node that refuses, fails or does not answer in time.
    """
    header = header_bytes(DescribeRequest(config_digest=config.digest()))
    messages = {str(node): Message(to_records(header), node, MessageType.QUERY, group_id="describe") for node in nodes}
    described = {
        int(node): _description(reply) for node, reply in exchange(grid, messages, config.federation.join_timeout_s)
    }
    if len(described) < len(nodes):
        raise RunError(
            f"{len(nodes) - len(described)} of {len(nodes)} sites did not describe themselves within "
            f"{config.federation.join_timeout_s:g} s; expected all. Check their logs."
        )
    return described


def _description(reply: Message) -> SiteDescription:
    if reply.has_error():
        raise RunError(f"a site failed before the first round (Flower error {reply.error.code}). See its log.")
    try:
        header, _ = from_records(reply.content)
        description = parse_header(header, SiteDescription)
    except WireError as error:
        raise RunError(f"a site's description was not usable: {error}") from None
    if isinstance(description, Refusal):
        raise RunError(
            f"a site refused to take part: {description.code!r} at {description.place or 'unknown'}. "
            "The reason is in that site's log."
        )
    return description
