"""The ClientApp of virtual sites: decode, call, encode, in the process that simulates. Never of a real site.

It reads rows where the run config says, which at a real site would be the coordinator's choice: see client/app.py.
"""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answers import answer
from client.refusals import log_line, refusal_of
from client.site import virtual_site
from common.flower_keys import DEVICE
from common.flower_records import from_records, to_records
from common.models.resident import resident_model
from common.quiet import quiet_dependencies
from common.run_source import run_config_of
from common.wire import header_bytes

logger = logging.getLogger(__name__)

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say whether and how the virtual site takes part in the run."""
    return _reply(message, context, "query")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round and send the update."""
    return _reply(message, context, "train")


def _reply(message: Message, context: Context, kind: str) -> Message:
    quiet_dependencies()
    try:
        config = run_config_of(context.run_config)
        model = resident_model(config, str(context.node_config.get(DEVICE, "auto")))
        site = virtual_site(config, context.node_config, model)
        content = to_records(*answer(kind, *from_records(message.content), site, config, model))
    except Exception as error:  # noqa: BLE001 - Flower would send the exception's text to the coordinator
        logger.error("%s", log_line(error))
        content = to_records(header_bytes(refusal_of(error)))
    return Message(content, reply_to=message)
