"""The Flower ClientApp: decode, call, encode. What leaves through an error is a code, never a text."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.answers import answer_describe, answer_train
from client.site import Site, real_site, virtual_site
from client.site_config import SITE_CONFIG, SiteConfig, load_site_config
from common.config.run import RunConfig
from common.errors import ConfigError, FedtuneError
from common.flower_records import from_records, to_records
from common.models.adapter import AdaptedModel
from common.models.resident import resident_model
from common.quiet import quiet_dependencies
from common.run_source import APP_ROOT, DEVICE, run_config_of
from common.wire import Refusal, header_bytes

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
        config = run_config_of(context.run_config)
        own = _site_config(context.node_config)
        device = str(context.node_config.get(DEVICE, "auto")) if own is None else own.device
        model = resident_model(config, device)
        site = virtual_site(config, context.node_config, model) if own is None else real_site(config, own, model)
        header, payload = from_records(message.content)
        content = to_records(*answer(header, payload, site, config, model))
    except FedtuneError as error:
        logger.error("%s", error)
        content = _refusal(error.code, error)
    except Exception as error:  # noqa: BLE001 - Flower would send the exception's text to the coordinator
        logger.error("internal error %s at %s", type(error).__name__, _place(error))
        content = _refusal("internal", error)
    return Message(content, reply_to=message)


def _site_config(node_config: Mapping[str, object]) -> SiteConfig | None:
    """Return the config of a real site, None for a virtual one."""
    path = node_config.get(SITE_CONFIG)
    if path is None:
        return None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{SITE_CONFIG} of the node config is {path!r}; expected the path of a site config.")
    return load_site_config(Path(path))


def _refusal(code: str, error: BaseException) -> RecordDict:
    return to_records(header_bytes(Refusal(code=code, place=_place(error))))


def _place(error: BaseException) -> str:
    """File and line of our own code nearest to where the error arose; no values."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(APP_ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(APP_ROOT).as_posix()}:{frame.lineno}"
    return type(error).__name__
