"""What a site's agent keeps between messages, and how it answers one: the site's side of a federation.

Every message is taken as hostile: it came through a ClientApp that the coordinator wrote. Nothing in it chooses a path,
a row or a model (``client.agreement``), and the site config is the site's alone. It is read again for each message, so
that what the engineer changes holds at once; while it cannot be read, everything is refused.

Model and rows are loaded by the first message of a run and stay; rows are read anew when their file has changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from weakref import ref

from client.agreement import agreed_config
from client.answers import ANSWERS, answer
from client.policy.rules import expect_base, expect_open, expect_size
from client.refusals import log_line, refusal_of
from client.site import Site, real_site
from client.site_config import SiteConfig, load_site_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.flower_keys import CONFIG_YAML
from common.methods import expect_rank
from common.models.adapter import AdaptedModel
from common.models.resident import loads, resident_model
from common.run_source import run_config_of
from common.wire import Refusal, TrainRequest, header_bytes, parse_header

logger = logging.getLogger(__name__)


@dataclass
class _Held:
    """The rows that are held, and what they were read for; a model of the past only by a weak reference."""

    key: object = None
    site: Site | None = None


@dataclass
class _Activity:
    """What the agent is doing and has done; no figure of the data."""

    started: float = field(default_factory=time.time)
    doing: str = "idle"
    since: float = field(default_factory=time.time)
    last_round: dict[str, Any] | None = None
    counts: Counter[str] = field(default_factory=Counter)


class ResidentSite:
    """A real site, held in memory; answers one message at a time.

    Args:
        path: of the site config.

    Raises:
        ConfigError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = load_site_config(path).name
        self._one = threading.Lock()
        self._held = _Held()
        self._activity = _Activity()

    def answer(self, kind: str, config_yaml: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Return header and payload of the answer; a refusal for whatever cannot be answered.

        Args:
            kind: "query" or "train".
            config_yaml: the run config, as the coordinator sent it.
            header: of the message.
            payload: of the message.
        """
        with self._one:
            began = time.monotonic()
            known = kind if kind in ANSWERS else "message"
            self._activity.doing, self._activity.since = f"answering a {known}", time.time()
            self._activity.counts["messages"] += 1
            try:
                answered = self._answer(kind, config_yaml, header, payload)
            except Exception as error:  # noqa: BLE001 - its text may quote rows: a code leaves instead
                logger.error("refused: %s", " ".join(log_line(error).split()))
                self._activity.counts["refusals"] += 1
                answered = header_bytes(refusal_of(error)), b""
            else:
                self._note(kind, header)
            self._activity.doing, self._activity.since = "idle", time.time()
            logger.info("answered a %s in %.1f s", known, time.monotonic() - began)
            return answered

    def status(self) -> dict[str, Any]:
        """Return what the site's engineer is shown: names, times and counts of messages, none of rows."""
        done = self._activity
        return {
            "site": self._name,
            "pid": os.getpid(),
            "started": done.started,
            "doing": done.doing,
            "since": done.since,
            "last_round": done.last_round,
            "messages": done.counts["messages"],
            "refusals": done.counts["refusals"],
            "rounds": done.counts["rounds"],
            "model_loads": loads(),
            "data_loads": done.counts["data_loads"],
        }

    def _answer(self, kind: str, config_yaml: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        own = load_site_config(self._path)
        expect_open(own.policy, datetime.now())
        config = _run_config(config_yaml)
        agreed = agreed_config(config, own)
        rank = expect_rank(agreed, own.max_rank, own.name)
        expect_size(own.policy, agreed)
        model = resident_model(agreed, own.device, rank)
        expect_base(own.policy, model)
        return answer(kind, header, payload, self._site(config, own, model), config, model)

    def _site(self, config: RunConfig, own: SiteConfig, model: AdaptedModel) -> Site:
        """Return the site with its rows, which are read again when config or file are others than before."""
        key = (agreed_config(config, own).data, own, ref(model), _state_of(Path(own.data)))
        if self._held.site is None or self._held.key != key:
            self._held = _Held()  # let go of the old rows first
            site = real_site(config, own, model)
            self._activity.counts["data_loads"] += 1
            self._held = _Held(key, site)
            return site
        return self._held.site

    def _note(self, kind: str, header: bytes) -> None:
        request = parse_header(header, TrainRequest) if kind == "train" else None
        if request is not None and not isinstance(request, Refusal):
            self._activity.counts["rounds"] += 1
            self._activity.last_round = {"run": request.run, "round": request.round, "time": time.time()}


def _run_config(text: bytes) -> RunConfig:
    """Return the run config, which a site takes as text only: a path would be the coordinator's choice."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        decoded = ""
    if not decoded.strip():
        raise ConfigError(f"the message has no {CONFIG_YAML}; expected a run config as text: a site opens no path.")
    return run_config_of({CONFIG_YAML: decoded})


def _state_of(path: Path) -> object:
    """What tells a file from a changed one; its content where that is not enough to go by."""
    try:
        found = path.stat()
    except OSError:
        return None
    recent = time.time() - found.st_mtime < 2.0
    content = hashlib.sha256(path.read_bytes()).hexdigest() if recent else ""
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, content)
