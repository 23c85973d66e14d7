"""A real site as its agent holds it, and a coordinator that talks to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from flwr.app import MessageType

from client.agent.resident import ResidentSite
from client.agreement import agreed_config
from client.app import config_bytes
from client.ledger.ledger import Ledger
from client.site_config import load_site_config
from common.codecs.codec import encode
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.tensors import Tensors
from common.wire import DescribeRequest, Refusal, SiteDescription, TrainReply, TrainRequest, header_bytes, parse_header
from tests.conftest import label_rows, write_rows

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}
RUN, NONCE = "c" * 32, "0" * 32


class RealSite:
    """A site config on 24 rows of its own, and a coordinator that talks to its agent in the words of a ClientApp."""

    def __init__(self, config: RunConfig, folder: Path, **budget: Any) -> None:
        self.rows = [row | {"patient": f"p{index % 8}"} for index, row in enumerate(label_rows(24))]
        self.data = write_rows(folder / "own.jsonl", self.rows)
        self.path = folder / "site.yaml"
        self.values: dict[str, Any] = {
            "name": "north", "data": "own.jsonl", "ledger": "ledger.db", "device": "cpu", "model": config.model.source,
            "rows": {"task": config.data.task, "labels": list(config.data.labels or ()) or None},
            "person_field": "patient", "budget": {"epsilon": 50.0, **budget},
        }  # fmt: skip
        self.write()
        self.resident = ResidentSite(self.path)
        self.ledger = Ledger(folder / "ledger.db")
        self.ledger.path.unlink(missing_ok=True)
        self.ledger.create()
        self.config = config
        self.flower_config: dict[str, Any] = {}
        self.model = resident_model(config, "cpu")

    def write(self, **changes: Any) -> None:
        """Write the site config; None takes a key out."""
        self.values |= changes
        self.path.write_text(yaml.safe_dump({key: value for key, value in self.values.items() if value is not None}))

    def own_model(self) -> AdaptedModel:
        """The model that the site trains; ``model`` is the coordinator's."""
        return resident_model(agreed_config(self.config, load_site_config(self.path)), "cpu")

    def send(self, header: bytes, payload: bytes, kind: str) -> tuple[bytes, bytes]:
        text = config_bytes(self.flower_config or {"config-yaml": dump_run_config(self.config)})
        return self.resident.answer(kind, text, header, payload)

    def describe(self) -> SiteDescription | Refusal:
        request = DescribeRequest(config_digest=self.config.digest())
        return parse_header(self.send(header_bytes(request), b"", MessageType.QUERY)[0], SiteDescription)

    def train(self, round_number: int, adapter: Tensors | None = None, **changes: Any) -> tuple[Any, bytes]:
        request = TrainRequest(
            config_digest=self.config.digest(), run=changes.get("run", RUN), round=round_number,
            nonce=changes.get("nonce", NONCE), base_fingerprint=self.model.base.fingerprint,
            fixed_ranks=changes.get("fixed_ranks", ()), mechanism=changes.get("mechanism"), rank=changes.get("rank"),
        )  # fmt: skip
        start = initial_adapter(self.model, self.config.seed) if adapter is None else adapter
        packed = encode(start, self.config.communication.codec)
        header, update = self.send(header_bytes(request), packed, MessageType.TRAIN)
        return parse_header(header, TrainReply), update
