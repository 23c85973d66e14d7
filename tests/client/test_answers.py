"""A real site behind the ClientApp: charged, committed, repeated to the byte, and refused at the end of its budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.app
from client.ledger.ledger import Ledger
from client.site import read_site_rows
from client.site_config import load_site_config
from common.codecs.codec import encode
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.flower_records import from_records, to_records
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.tensors import Tensors
from common.wire import DescribeRequest, Refusal, SiteDescription, TrainReply, TrainRequest, header_bytes, parse_header
from tests.conftest import label_rows, write_rows

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}
RUN, NONCE = "c" * 32, "0" * 32


class RealSite:
    """A site config on 24 rows of its own, and a coordinator that talks to the ClientApp through Flower's messages."""

    def __init__(self, config: RunConfig, folder: Path, **budget: Any) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        rows = [row | {"patient": f"p{index % 8}"} for index, row in enumerate(label_rows(24))]
        write_rows(folder / "own.jsonl", rows)
        self.path = folder / "site.yaml"
        values = {"name": "north", "data": "own.jsonl", "ledger": "ledger.db", "device": "cpu"}
        self.path.write_text(
            yaml.safe_dump(values | {"person_field": "patient", "budget": {"epsilon": 50.0, **budget}})
        )
        self.ledger = Ledger(folder / "ledger.db")
        self.config = config
        self.model = resident_model(config, "cpu")

    def send(self, header: bytes, payload: bytes, kind: str, node: dict[str, Any] | None = None) -> tuple[bytes, bytes]:
        context = Context(
            run_id=1, node_id=1, node_config=node or {"site-config": str(self.path)}, state=RecordDict(),
            run_config={"config-yaml": dump_run_config(self.config)},
        )  # fmt: skip
        message = Message(to_records(header, payload), 1, kind, group_id="1")
        message.metadata.__dict__["_message_id"] = "1"
        return from_records(client.app.app(message, context).content)

    def describe(self) -> SiteDescription | Refusal:
        request = DescribeRequest(config_digest=self.config.digest())
        return parse_header(self.send(header_bytes(request), b"", MessageType.QUERY)[0], SiteDescription)

    def train(self, round_number: int, adapter: Tensors | None = None, **changes: Any) -> tuple[Any, bytes]:
        request = TrainRequest(
            config_digest=self.config.digest(), run=changes.get("run", RUN), round=round_number,
            nonce=changes.get("nonce", NONCE), base_fingerprint=self.model.base.fingerprint,
        )  # fmt: skip
        start = initial_adapter(self.model, self.config.seed) if adapter is None else adapter
        packed = encode(start, self.config.communication.codec)
        header, update = self.send(header_bytes(request), packed, MessageType.TRAIN)
        return parse_header(header, TrainReply), update


@pytest.fixture
def make_site(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RealSite]:
    def make(privacy: dict[str, Any] = PRIVATE, budget: dict[str, Any] | None = None, **sections: Any) -> RealSite:
        return RealSite(make_config(privacy=privacy, **sections), tmp_path, **(budget or {}))

    return make


def test_two_rounds_are_trained_on_the_sites_own_rows_and_stand_in_its_ledger(
    make_site: Callable[..., RealSite],
) -> None:
    site = make_site()
    described = site.describe()
    assert isinstance(described, SiteDescription)
    assert (described.site, described.seeded, described.num_examples) == ("north", False, None)
    updates = [site.train(number) for number in (1, 2)]
    for number, (reply, update) in enumerate(updates, start=1):
        assert isinstance(reply, TrainReply)
        assert (reply.site, reply.round) == ("north", number)
        assert update
    history = site.ledger.history()
    assert [key for key, entry in history.entries.items() if entry.committed] == [(RUN, 1), (RUN, 2)]
    (seen,) = history.datasets.values()
    assert seen.num_rows == 24
    site.ledger.verify()


def test_request_sent_again_gets_the_same_bytes_under_its_new_nonce(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    first, update = site.train(1)
    again, same = site.train(1, nonce="1" * 32)
    assert same == update
    assert again == first.model_copy(update={"nonce": "1" * 32})
    assert len(site.ledger.history().entries) == 1


@pytest.mark.parametrize("earlier", [False, True], ids=["other adapter", "dropped"])
def test_second_release_of_a_round_is_refused(make_site: Callable[..., RealSite], earlier: bool) -> None:
    site = make_site()
    site.train(1)
    changed = {name: value + 0.5 for name, value in initial_adapter(site.model, site.config.seed).items()}
    if earlier:
        site.train(2)
    reply, update = site.train(1, None if earlier else changed)
    assert isinstance(reply, Refusal)
    assert (reply.code, update) == ("privacy", b"")


def test_end_of_the_budget_refuses_and_trains_nothing(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    mechanism = plan_mechanism(site.config, 24)
    assert mechanism is not None
    site = make_site(budget={"epsilon": mechanism.epsilon_after(1) + 0.05})
    assert isinstance(site.train(1)[0], TrainReply)
    before = {name: value.clone() for name, value in site.model.state().items()}
    reply, update = site.train(2, run="d" * 32)
    assert isinstance(reply, Refusal)
    assert (reply.code, update) == ("privacy", b"")
    assert all(torch.equal(value, before[name]) for name, value in site.model.state().items())
    assert len(site.ledger.history().entries) == 1


def test_crash_in_training_stays_charged_and_is_trained_again_under_its_reservation(
    make_site: Callable[..., RealSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    with monkeypatch.context() as patch:
        patch.setattr("client.answers.train_locally", lambda *arguments: 1 / 0)
        reply, update = site.train(1)
    assert isinstance(reply, Refusal)
    assert (reply.code, update) == ("internal", b"")
    (entry,) = site.ledger.history().entries.values()
    assert entry.committed is None
    assert isinstance(site.train(1)[0], TrainReply)
    assert len(site.ledger.history().entries) == 1


@pytest.mark.parametrize(
    ("privacy", "budget"),
    [
        ({"unit": "none"}, {}),
        ({"unit": "site"}, {}),
        (PRIVATE, {"unit": "user"}),
        (PRIVATE | {"unit": "user"}, {"unit": "user"}),
    ],
    ids=["no noise", "noise at the coordinator", "examples under a budget for persons", "other person field"],
)
def test_run_that_the_budget_cannot_count_is_refused(
    make_site: Callable[..., RealSite], privacy: dict[str, Any], budget: dict[str, Any]
) -> None:
    data = {"person_field": "text"} if privacy["unit"] == "user" else {}
    site = make_site(privacy, budget, data=data)
    replies = [site.describe(), site.train(1)[0]]
    assert all(isinstance(reply, Refusal) and reply.code == "privacy" for reply in replies)
    assert site.ledger.history().entries == {}


def test_run_for_persons_is_counted_by_persons_of_the_site(make_site: Callable[..., RealSite]) -> None:
    site = make_site(PRIVATE | {"unit": "user"}, {"unit": "user"}, data={"person_field": "patient"})
    rows = read_site_rows(site.config, load_site_config(site.path))
    assert (rows.num_units("user"), rows.num_units("example")) == (8, 24)
    reply, _ = site.train(1)
    assert isinstance(reply, TrainReply)
    (entry,) = site.ledger.history().entries.values()
    assert entry.reserved.charge.unit == "user"
    assert entry.reserved.charge.sample_rate == 4 / 8


def test_site_without_a_usable_ledger_trains_nothing(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    site.ledger.path.write_bytes(b"")
    before = {name: value.clone() for name, value in site.model.state().items()}
    for reply in (site.describe(), site.train(1)[0]):
        assert isinstance(reply, Refusal)
        assert reply.code == "privacy"
    assert all(torch.equal(value, before[name]) for name, value in site.model.state().items())


@pytest.mark.parametrize("node", [{"site-config": 7}, {"site-config": "nowhere.yaml"}, {"site-config": ""}])
def test_site_config_that_cannot_be_read_is_never_taken_for_a_virtual_site(
    make_site: Callable[..., RealSite], node: dict[str, Any]
) -> None:
    site = make_site()
    request = header_bytes(DescribeRequest(config_digest=site.config.digest()))
    node |= {"partition-id": 0, "num-partitions": 3}
    reply = parse_header(site.send(request, b"", MessageType.QUERY, node)[0], SiteDescription)
    assert isinstance(reply, Refusal)
    assert reply.code == "config"
