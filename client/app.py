"""The Flower ClientApp: decode, call, encode. What leaves through an error is a code, never a text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.agreement import agreed_config
from client.answers import answer_describe, answer_train
from client.refusals import log_line, refusal_of
from client.site import Site, real_site, virtual_site
from client.site_config import SITE_CONFIG, SiteConfig, load_site_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.flower_records import from_records, to_records
from common.models.adapter import AdaptedModel
from common.models.resident import resident_model
from common.quiet import quiet_dependencies
from common.run_source import CONFIG_YAML, DEVICE, run_config_of
from common.wire import header_bytes

logger = logging.getLogger(__name__)

Answer = Callable[[bytes, bytes, Site, RunConfig, AdaptedModel], tuple[bytes, bytes]]

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say whether and how this site takes part in the run."""
    return _reply(message, context, _describe)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round and send the update."""
    return _reply(message, context, _train)


def _describe(header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> tuple[bytes, bytes]:
    return header_bytes(answer_describe(header, site, config, model)), b""


def _train(header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> tuple[bytes, bytes]:
    reply, update = answer_train(header, payload, site, config, model)
    return header_bytes(reply), update


def _reply(message: Message, context: Context, answer: Answer) -> Message:
    quiet_dependencies()
    try:
        own = _site_config(context.node_config)
        config = _run_config(context.run_config, own)
        model, site = _virtual(config, context.node_config) if own is None else _real(config, own)
        header, payload = from_records(message.content)
        content = to_records(*answer(header, payload, site, config, model))
    except Exception as error:  # noqa: BLE001 - Flower would send the exception's text to the coordinator
        logger.error("%s", log_line(error))
        content = to_records(header_bytes(refusal_of(error)))
    return Message(content, reply_to=message)


def _virtual(config: RunConfig, node_config: Mapping[str, object]) -> tuple[AdaptedModel, Site]:
    model = resident_model(config, str(node_config.get(DEVICE, "auto")))
    return model, virtual_site(config, node_config, model)


def _real(config: RunConfig, own: SiteConfig) -> tuple[AdaptedModel, Site]:
    model = resident_model(agreed_config(config, own), own.device)
    return model, real_site(config, own, model)


def _run_config(flower_config: Mapping[str, object], own: SiteConfig | None) -> RunConfig:
    """Return the run config; a real site takes it as text only, as a path would be the coordinator's choice."""
    text = flower_config.get(CONFIG_YAML)
    if own is not None and not (isinstance(text, str) and text.strip()):
        raise ConfigError(f"Flower's run config has no {CONFIG_YAML}; expected it at a real site, which opens no path.")
    return run_config_of(flower_config)


def _site_config(node_config: Mapping[str, object]) -> SiteConfig | None:
    """Return the config of a real site, None for a virtual one."""
    path = node_config.get(SITE_CONFIG)
    if path is None:
        return None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{SITE_CONFIG} of the node config is {path!r}; expected the path of a site config.")
    return load_site_config(Path(path))
