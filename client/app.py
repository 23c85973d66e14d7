"""The Flower ClientApp: forwards a message's bytes to the site's resident agent, which alone has data and model.

Flower starts a process for every message, on code that the coordinator has shipped. So nothing is decided here: the
node config, which the site's engineer sets, says where the agent's socket is. A node without one is a simulated node of
Flower's own simulation runtime, or it is refused: a site's data are never read in this process.

Imports flwr, grpc and the standard library; what leaves through an error is a code, never a text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.agent.channel import ask
from common.errors import ConfigError, FedtuneError
from common.flower_keys import AGENT_SOCKET, CONFIG_YAML
from common.flower_records import from_records, to_records

logger = logging.getLogger(__name__)

SIMULATED = ("partition-id", "num-partitions")
"""Keys of the node config that Flower's simulation runtime sets, and no site."""
_REFUSED = b'{"kind":"refusal","protocol":1,"code":"%s","place":""}'

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Have the agent say whether and how this site takes part in the run."""
    return reply_to(message, context, "query")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Have the agent train a round."""
    return reply_to(message, context, "train")


def reply_to(message: Message, context: Context, kind: str) -> Message:
    """Return the agent's answer, or a refusal."""
    if _is_simulated(context.node_config):
        from client.virtual_app import app as virtual_app  # loads torch, in Flower's simulation runtime alone

        return virtual_app(message, context)
    try:
        socket = _socket(context.node_config)
        content = to_records(*ask(socket, kind, (config_bytes(context.run_config), *from_records(message.content))))
    except Exception as error:  # noqa: BLE001 - Flower would send the exception's text to the coordinator
        code = "no_agent" if isinstance(error, FedtuneError) else "internal"
        logger.error("%s", error if isinstance(error, FedtuneError) else type(error).__name__)
        content = to_records(_REFUSED % code.encode())
    return Message(content, reply_to=message)


def _is_simulated(node_config: Mapping[str, object]) -> bool:
    return AGENT_SOCKET not in node_config and all(isinstance(node_config.get(key), int) for key in SIMULATED)


def _socket(node_config: Mapping[str, object]) -> Path:
    path = node_config.get(AGENT_SOCKET)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"the node config has no {AGENT_SOCKET}; expected a node that fedtune-client up started.")
    return Path(path)


def config_bytes(run_config: Mapping[str, object]) -> bytes:
    """Return the run config that Flower's run config carries as text; nothing where it carries none."""
    text = run_config.get(CONFIG_YAML)
    return text.encode("utf-8", "replace") if isinstance(text, str) else b""
