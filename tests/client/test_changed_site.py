"""A site whose rows or rank change while a run is on: it says so, spends nothing, and comes in again as what it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.factors import with_rank
from common.models.adapter import initial_adapter
from common.wire import CHANGED, Refusal, SiteDescription, TrainReply
from server.cohort import Member
from tests.client.real_sites import PRIVATE, RealSite
from tests.conftest import write_rows
from tests.server.scripted import play
from tests.server.test_rounds import description

MakeConfig = Callable[..., RunConfig]


def described(site: RealSite) -> SiteDescription:
    told = site.describe()
    assert isinstance(told, SiteDescription)
    return told


def test_site_with_other_rows_than_it_told_spends_nothing_until_it_is_asked_anew(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    plan = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "accountant": "rdp"}
    site = RealSite(make_config(privacy=plan, federation={"rounds": 4}), tmp_path)
    before = described(site).mechanism
    assert isinstance(site.train(1, mechanism=before)[0], TrainReply)
    more = [
        row | {"text": f"{row['text']} since {day}", "patient": f"q{day}"} for day, row in enumerate(site.rows[:12])
    ]
    write_rows(site.data, site.rows + more)
    reply, update = site.train(2, mechanism=before)
    assert isinstance(reply, Refusal)
    assert (reply.code, update) == (CHANGED, b"")
    assert [number for _, number in site.ledger.history().entries] == [1]
    after = described(site).mechanism
    assert after != before
    reply, _ = site.train(2, mechanism=after)
    assert isinstance(reply, TrainReply)
    assert reply.mechanism == after


def test_site_with_another_rank_than_it_told_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"adapter": {"rank": 6, "alpha": 5.0}, "federation": {"rounds": 3}}
    config = make_config(privacy=PRIVATE, aggregation={"method": "flexlora"}, **wide)
    site = RealSite(config, tmp_path)
    site.write(max_rank=4)
    assert described(site).max_rank == 4
    start = initial_adapter(site.model, config.seed)
    assert isinstance(site.train(1, with_rank(start, 4), rank=4)[0], TrainReply)
    for cap, rank in ((2, 2), (None, 6)):
        site.write(max_rank=cap)
        reply = site.train(2, with_rank(start, 4), rank=4)[0]
        assert isinstance(reply, Refusal)
        assert reply.code == CHANGED
        assert described(site).max_rank == cap
        assert isinstance(site.train(2 if cap else 3, with_rank(start, rank), rank=rank)[0], TrainReply)


class Anew:
    """Those who may come in: whoever is away, as what it is by now."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def come(self, grid: Any, members: Collection[str]) -> Mapping[str, Member]:
        away = sorted({"a", "b", "c"} - set(members))
        self.asked.append(away)
        return {site: Member("abc".index(site), description(site, num_examples=77)) for site in away}


@pytest.mark.parametrize("mode", [{}, {"mode": "async", "buffer_size": 2}])
def test_site_that_has_changed_comes_in_again_with_the_next_round(
    make_config: MakeConfig, mode: dict[str, Any]
) -> None:
    config = make_config(federation={"rounds": 3, **mode}, aggregation={"weights": "examples"})
    anew = Anew()
    grid, records = play(
        config, "abc", lambda site, number, now: (1.0, CHANGED) if (site, number) == ("b", 1) else 1.0, newcomers=anew
    )
    again = anew.asked.index(["b"])  # before the round after the one that it answered in
    assert anew.asked == [["b"] if place == again else [] for place in range(3)]
    assert records[again]["joined"] == ["b"]
    assert [number for site, number, _ in grid.asked if site == "b"][:2] == [1, again + 1]
    if not mode:
        assert again == 1
        assert records[0]["sites"]["b"]["reason"].startswith("changed: the site refused")
        assert records[1]["sites"]["b"]["weight"] == 1.0
        assert records[1]["sites"]["a"]["weight"] < 1.0
