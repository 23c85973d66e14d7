"""A real site caps its rank, takes corrections of the right shape only, and keeps what is personal."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from safetensors.torch import load

import client.ledger.store
import client.site
from client.state import SiteStates
from common.factors import A, B, Factors, fixed_ranks, fixed_tensors, layers_of, with_rank
from common.models.adapter import initial_adapter
from common.tensors import Tensors
from common.wire import Refusal, SiteDescription, TrainReply
from tests.client.real_sites import RUN, RealSite


def heads(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if ".lora_" not in name}


def test_site_says_its_largest_rank_and_trains_at_it(make_site: Callable[..., RealSite]) -> None:
    site = make_site(aggregation={"method": "flexlora"}, adapter={"rank": 4, "alpha": 8})
    site.write(max_rank=1)
    described = site.describe()
    assert isinstance(described, SiteDescription)
    assert described.max_rank == 1
    start = initial_adapter(site.model, site.config.seed)
    refused, _ = site.train(1, start)
    assert isinstance(refused, Refusal)
    reply, update = site.train(1, with_rank(start, 1))
    assert isinstance(reply, TrainReply)
    sent = load(update)
    assert {len(value) for name, value in sent.items() if name.endswith(A)} == {1}
    assert {value.shape[1] for name, value in sent.items() if name.endswith(B)} == {1}


def test_site_below_the_runs_rank_refuses_a_method_that_needs_one(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    site.write(max_rank=1)
    for reply in (site.describe(), site.train(1)[0]):
        assert isinstance(reply, Refusal)
        assert reply.code == "config"
    assert site.ledger.history().entries == {}


def test_site_applies_a_correction_that_it_was_sent(make_site: Callable[..., RealSite]) -> None:
    site = make_site(aggregation={"method": "flora"})
    start = initial_adapter(site.model, site.config.seed)
    received = heads(start)
    for layer in layers_of(start):
        b, a = torch.ones(len(start[layer + B]), 1), torch.ones(1, start[layer + A].shape[1])
        received |= fixed_tensors(layer, Factors(b, a))
    reply, update = site.train(2, received, fixed_ranks=fixed_ranks(received | start))
    assert isinstance(reply, TrainReply)
    assert not any(".fixed_" in name for name in load(update))
    assert site.own_model().corrections.layers == frozenset(layers_of(start))


@pytest.mark.parametrize("ranks", [(1,), (99,) * 4, (2,) * 4, (0,) * 4], ids=["few", "large", "other", "none"])
def test_correction_of_another_shape_than_announced_is_refused(
    make_site: Callable[..., RealSite], ranks: tuple[int, ...]
) -> None:
    site = make_site(aggregation={"method": "flora"})
    start = initial_adapter(site.model, site.config.seed)
    received = heads(start)
    for layer in layers_of(start):
        b, a = torch.ones(len(start[layer + B]), 1), torch.ones(1, start[layer + A].shape[1])
        received |= fixed_tensors(layer, Factors(b, a))
    reply, _ = site.train(2, received, fixed_ranks=ranks)
    assert isinstance(reply, Refusal)
    assert reply.code == "wire"
    assert site.ledger.history().entries == {}


def test_correction_under_a_method_without_one_is_refused(make_site: Callable[..., RealSite]) -> None:
    site = make_site()
    reply, _ = site.train(1, fixed_ranks=(1, 1, 1, 1))
    assert isinstance(reply, Refusal)
    assert reply.code == "wire"


def test_site_keeps_releases_and_personal_factors_of_the_newest_runs_alone(
    make_site: Callable[..., RealSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.site, "KEPT_RUNS", 2)
    monkeypatch.setattr(client.ledger.store, "KEPT_RELEASES", 2)
    site = make_site(aggregation={"method": "fedsa_lora"})
    start = initial_adapter(site.model, site.config.seed)
    received = {name: value for name, value in start.items() if not name.endswith(B)}
    runs = [f"{number}" * 32 for number in range(3)]
    assert all(isinstance(site.train(1, received, run=run)[0], TrainReply) for run in runs)
    with closing(sqlite3.connect(site.ledger.path)) as connection:
        assert [run for (run,) in connection.execute("SELECT run FROM payloads ORDER BY run")] == runs[1:]
    personal = SiteStates(site.path.parent / "ledger.db-personal")
    assert [personal.sites(run, "personal") for run in runs] == [(), ("north",), ("north",)]
    assert [type(site.train(2, received, run=run)[0]) for run in runs] == [Refusal, TrainReply, TrainReply]
    assert (runs[0], 2) not in site.ledger.history().entries
    site.ledger.verify()


def test_personal_factors_stay_beside_the_ledger(make_site: Callable[..., RealSite]) -> None:
    site = make_site(aggregation={"method": "fedsa_lora"})
    start = initial_adapter(site.model, site.config.seed)
    received = {name: value for name, value in start.items() if not name.endswith(B)}
    reply, update = site.train(1, received)
    assert isinstance(reply, TrainReply)
    assert not any(name.endswith(B) for name in load(update))
    personal = SiteStates(site.path.parent / "ledger.db-personal")
    (name,) = personal.sites(RUN, "personal")
    kept = personal.before(RUN, name, "personal", 2) or {}
    assert {name for name in start if name.endswith(B)} == kept.keys()
    assert all(value.any() for value in kept.values())
    site.train(2, received)
    again = personal.before(RUN, name, "personal", 3) or {}
    assert all(not torch.equal(again[name], kept[name]) for name in kept)
