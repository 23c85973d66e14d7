"""The virtual grid: a Flower Grid whose nodes are calls to the ClientApp in this process.

One message is handled at a time, when its reply is pulled, so that one update is in memory and Ctrl-C takes effect at
once. What crosses is serialised by the wire format: neither side sees an object of the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.flower_records import from_records

FIRST_NODE_ID = 1

Watch = Callable[[int, bytes, bytes], None]
"""Told the node and the payloads of request and reply: what a coordinator sees on the wire."""


class VirtualGrid(Grid):
    """Delivers messages to a ClientApp by calling it.

    Args:
        client_app: handles the messages of every node.
        nodes: number of virtual nodes.
        run_config: Flower's run config, as a bundle would carry it.
        device: put into every node's config.
        watch: called after every reply.
    """

    def __init__(
        self, client_app: ClientApp, nodes: int, run_config: dict[str, str], device: str = "auto",
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self._app = client_app
        self._nodes = nodes
        self._run_config = run_config
        self._device = device
        self._watch = watch
        self._queue: deque[Message] = deque()
        self._run = Run.create_empty(run_id=1)
        # Flower's Message reads these when it is made or answered; a SuperNode would set them.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

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
        """Queue messages and return their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._queue.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Handle the oldest queued message among ``message_ids`` and return its reply, if there is one."""
        wanted = set(message_ids)
        for _ in range(len(self._queue)):
            message = self._queue.popleft()
            if message.metadata.message_id in wanted:
                return [self._handle(message)]
            self._queue.append(message)
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the reply to each message, handled when it is asked for."""
        for message_id in self.push_messages(messages):
            yield from self.pull_messages([message_id])

    def _handle(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config={
                "partition-id": node - FIRST_NODE_ID, "num-partitions": self._nodes, "device": self._device,
            },
            state=RecordDict(),
            run_config=dict(self._run_config),
        )  # fmt: skip
        if not FIRST_NODE_ID <= node < FIRST_NODE_ID + self._nodes:
            return Message(Error(code=0, reason="unknown node"), reply_to=message)
        reply = self._app(message, context)
        if self._watch is not None and reply.has_content():
            self._watch(node, from_records(message.content)[1], from_records(reply.content)[1])
        return reply
