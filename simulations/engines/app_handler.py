"""The handler of virtual sites: calls the deployment's own ClientApp, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Context, Message, RecordDict

from common.flower_keys import DEVICE
from common.flower_records import from_records, to_records
from simulations.cache import virtual_node
from simulations.engines.engine import Answer, Request
from simulations.flower_internals import identify_process

FIRST_NODE_ID = 1

App = Callable[[Message, Context], Message]


class AppHandler:
    """Answers by calling a ClientApp, as a SuperNode would.

    Args:
        app: the ClientApp.
        nodes: number of virtual sites.
        run_config: Flower's run config, as a bundle would carry it.
        device: put into every node's config.
        node: further entries of every node's config.
    """

    most = 1

    def __init__(
        self, app: App, nodes: int, run_config: Mapping[str, str], device: str = "auto",
        node: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._app = app
        self._nodes = nodes
        self._run_config = dict(run_config)
        self._node = {DEVICE: device, **(node or {})}
        identify_process()

    def handle(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the ClientApp's answers."""
        for request in requests:
            yield self._answer(request)

    def _answer(self, request: Request) -> Answer:
        node_id = FIRST_NODE_ID + request.node
        content = to_records(request.header, request.payload)
        message = Message(content, node_id, request.kind)
        message.metadata.__dict__["_message_id"] = str(request.ticket)
        context = Context(
            run_id=1,
            node_id=node_id,
            node_config={**virtual_node(request.node, self._nodes), **self._node},
            state=RecordDict(),
            run_config=dict(self._run_config),
        )
        reply = self._app(message, context)
        if reply.has_error():
            return Answer(request.ticket, failure=f"Flower error {reply.error.code}")
        return Answer(request.ticket, *from_records(reply.content))
