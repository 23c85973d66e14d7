"""A real site as its agent holds it: charged, committed, repeated to the byte, and refused at the end of its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from client.ledger.ledger import RoundRequest
from client.ledger.site_ledger import SiteLedger
from client.site import read_site_rows
from client.site_config import load_site_config
from common.errors import DataError, PrivacyError
from common.models.adapter import initial_adapter
from common.privacy.planning import plan_mechanism
from common.wire import Refusal, SiteDescription, TrainReply
from tests.client.ledgers import cut_off_write
from tests.client.real_sites import PRIVATE, RUN, RealSite


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
    before = {name: value.clone() for name, value in site.own_model().state().items()}
    reply, update = site.train(2, run="d" * 32)
    assert isinstance(reply, Refusal)
    assert (reply.code, update) == ("privacy", b"")
    assert all(torch.equal(value, before[name]) for name, value in site.own_model().state().items())
    assert len(site.ledger.history().entries) == 1


FAILURES = [ZeroDivisionError("row 7"), DataError("row 8"), PrivacyError("row 9"), MemoryError(), RuntimeError("cuda")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_failure_in_training_is_the_only_answer_to_its_round(
    make_site: Callable[..., RealSite], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    site = make_site()
    with monkeypatch.context() as patch:
        patch.setattr("client.answers.train_locally", raising(failure))
        first = site.train(1)
    (entry,) = site.ledger.history().entries.values()
    assert entry.committed is not None
    with monkeypatch.context() as patch:
        patch.setattr("client.answers.train_locally", lambda *arguments: pytest.fail("trained again"))
        assert first == site.train(1, nonce="1" * 32) == (Refusal(code="round_failed", place=""), b"")
    assert isinstance(site.train(2)[0], TrainReply)
    assert len(site.ledger.history().entries) == 2


@pytest.mark.parametrize("kill", [KeyboardInterrupt(), SystemExit(1)], ids=lambda kill: type(kill).__name__)
def test_kill_in_training_stays_charged_and_is_trained_again_under_its_reservation(
    make_site: Callable[..., RealSite], monkeypatch: pytest.MonkeyPatch, kill: BaseException
) -> None:
    site = make_site()
    with monkeypatch.context() as patch:
        patch.setattr("client.answers.train_locally", raising(kill))
        with pytest.raises(type(kill)):
            site.train(1)
    (entry,) = site.ledger.history().entries.values()
    assert entry.committed is None
    assert isinstance(site.train(1)[0], TrainReply)
    assert len(site.ledger.history().entries) == 1


def test_write_cut_off_by_a_crash_is_taken_back_by_the_next_round(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    site.write(policy={"epsilon_per_run": 50.0})
    assert isinstance(site.train(1)[0], TrainReply)
    before = site.ledger.history()
    cut_off_write(site.ledger.path, site.ledger.path)
    with pytest.raises(PrivacyError, match="in the middle of a write"):
        site.ledger.history()
    assert isinstance(site.train(2)[0], TrainReply)
    after = site.ledger.history()
    assert after.entries.keys() == before.entries.keys() | {(RUN, 2)}
    site.ledger.verify()


def test_failure_after_the_commit_sends_what_was_committed(
    make_site: Callable[..., RealSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, commit = make_site(), SiteLedger.commit

    def breaking_once(self: SiteLedger, asked: RoundRequest, release: bytes) -> bytes:
        monkeypatch.setattr(SiteLedger, "commit", commit)
        commit(self, asked, release)
        raise OSError("after the commit")

    monkeypatch.setattr(SiteLedger, "commit", breaking_once)
    reply, update = site.train(1)
    assert isinstance(reply, TrainReply)
    assert site.train(1) == (reply, update)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


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


@pytest.mark.parametrize(
    ("unit", "delta", "refused"),
    [("example", 1 / 24, True), ("example", 1 / 25, False), ("user", 1 / 8, True), ("user", 1 / 9, False)],
)
def test_delta_of_one_over_the_number_of_units_is_refused(
    make_site: Callable[..., RealSite], unit: str, delta: float, refused: bool
) -> None:
    site = make_site(PRIVATE | {"unit": unit}, {"unit": unit, "delta": delta}, data={"person_field": "patient"})
    for reply in (site.describe(), site.train(1)[0]):
        assert isinstance(reply, Refusal) == refused
        assert not refused or reply.code == "privacy"
    assert len(site.ledger.history().entries) == (not refused)


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
    before = {name: value.clone() for name, value in site.own_model().state().items()}
    for reply in (site.describe(), site.train(1)[0]):
        assert isinstance(reply, Refusal)
        assert reply.code == "privacy"
    assert all(torch.equal(value, before[name]) for name, value in site.own_model().state().items())


def test_site_config_that_cannot_be_read_refuses_everything(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    content = site.path.read_text()
    for broken in ("", "name: 7", content + "unknown: 1\n"):
        site.path.write_text(broken)
        reply = site.describe()
        assert isinstance(reply, Refusal)
        assert reply.code == "config"
    site.path.write_text(content)
    assert isinstance(site.describe(), SiteDescription)
