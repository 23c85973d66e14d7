"""The virtual grid: a Flower Grid whose nodes are virtual sites, handled by an engine.

What crosses is the wire's header and payload as bytes: neither side sees an object of the other, wherever it runs.
Replies come one after the other, as the engine has them, so that memory does not grow with the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from itertools import count

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from common.flower_records import from_records, to_records
from simulations.engines.app_handler import FIRST_NODE_ID
from simulations.engines.engine import Answer, Engine, Request
from simulations.flower_internals import Run, empty_run, identify_process

UNKNOWN_NODE, NODE_LOST = 0, 5
"""Flower's codes of an error reply."""

Watch = Callable[[int, bytes, bytes], None]
"""Told the node and the payloads of request and reply: what a coordinator sees on the wire."""


class VirtualGrid(Grid):
    """Delivers messages to the virtual sites behind an engine.

    Args:
        engine: has the messages handled. Whoever made it closes it.
        nodes: number of virtual nodes.
        watch: called after every reply.
    """

    def __init__(self, engine: Engine, nodes: int, watch: Watch | None = None) -> None:
        self._engine = engine
        self._nodes = nodes
        self._watch = watch
        self._tickets = count(1)
        self._waiting: dict[int, Message] = {}
        self._unclaimed: dict[str, Message] = {}
        self._run = empty_run()
        identify_process()

    def set_run(self, run: Run) -> None:
        """Set the run, as Flower's own grids are told theirs."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all virtual nodes."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the engine and return their ids."""
        ids, requests = [], []
        for message in messages:
            ticket = next(self._tickets)
            message.metadata.__dict__["_message_id"] = str(ticket)
            ids.append(str(ticket))
            node = message.metadata.dst_node_id - FIRST_NODE_ID
            if 0 <= node < self._nodes:
                self._waiting[ticket] = message
                requests.append(Request(ticket, node, message.metadata.message_type, *from_records(message.content)))
            else:
                self._unclaimed[str(ticket)] = Message(Error(UNKNOWN_NODE, "unknown node"), reply_to=message)
        self._engine.submit(requests)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to ``message_ids`` that are there, waiting for the first.

        Nothing is returned only where none of them is outstanding: a virtual site is never late.
        """
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        while True:
            found = [self._unclaimed.pop(known) for known in [*self._unclaimed] if known in wanted]
            if found or not self._waiting:
                return found
            answers = self._engine.collect()
            if not answers:
                return []
            for answer in answers:
                self._unclaimed[str(answer.ticket)] = self._reply(answer)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the reply to each message as it arrives."""
        waiting = set(self.push_messages(messages))
        while waiting:
            replies = self.pull_messages(waiting)
            if not replies:
                return
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply

    def _reply(self, answer: Answer) -> Message:
        message = self._waiting.pop(answer.ticket)
        if answer.failure is not None:
            return Message(Error(NODE_LOST, answer.failure), reply_to=message)
        if self._watch is not None:
            self._watch(message.metadata.dst_node_id, from_records(message.content)[1], answer.payload)
        return Message(to_records(answer.header, answer.payload), reply_to=message)
