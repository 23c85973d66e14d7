"""Whom the coordinator asks, how long it waits, and whom it asks again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

import server.clock
from common.config.round_rules import round_warnings
from common.config.run import RunConfig
from common.errors import RunError
from server.clock import IdleClock, pause
from server.requests import requests
from server.steering import Steering
from server.summary import epsilon_by_site
from simulations.flower_internals import identify_process
from tests.server.scripted import FAILS, REFUSES, play
from tests.server.test_rounds import make_round
from tests.server.test_transport import Seconds, Trickle

MakeConfig = Callable[..., RunConfig]
TWELVE = [f"site {number:02d}" for number in range(12)]


def counted(records: list[dict[str, Any]]) -> Counter[str]:
    """How many updates of each site counted."""
    found = Counter(site for record in records for site, o in record["sites"].items() if o["status"] == "admitted")
    found.update(one["site"] for record in records for one in record.get("carried", ()) if one["status"] == "admitted")
    return found


def test_short_outage_costs_few_of_the_rounds_that_are_skipped(make_config: MakeConfig) -> None:
    config = make_config(federation={"below_min": "skip", "min_sites": 2, "rounds": 20, "round_timeout_s": 600.0})
    grid, records = play(config, "abc", lambda site, number, now: (0.5, FAILS) if now < 60 else 1.0)
    assert ["skipped" in record for record in records] == [True] * 3 + [False] * 17
    assert [now for site, number, now in grid.asked if site == "a"][:4] == [0, 10.5, 31, 71.5]  # 10, 20 and 40 s apart


def test_pause_after_a_skipped_round_ends_with_what_the_round_was_given(make_config: MakeConfig) -> None:
    config = make_config(federation={"below_min": "skip", "rounds": 8, "round_timeout_s": 30.0})
    grid, _ = play(config, "a", lambda site, number, now: (0.0, REFUSES))
    assert [now for _, _, now in grid.asked] == [0, 10, 30, 60, 90, 120, 150, 180]
    assert grid.clock.now() == 180  # none after the last


@pytest.mark.parametrize("how", [FAILS, REFUSES])
def test_extended_round_asks_again_who_failed_and_charges_once(make_config: MakeConfig, how: str) -> None:
    federation = {"below_min": "extend", "extension_s": 300.0, "min_sites": 2, "rounds": 2}
    config = make_config(federation=federation)
    grid, records = play(config, "ab", lambda site, number, now: (0.5, how) if site == "b" and now < 30 else 1.0)
    assert [(site, number) for site, number, _ in grid.asked] == [
        ("a", 1), ("b", 1), ("b", 1), ("b", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert {outcome["status"] for outcome in records[0]["sites"].values()} == {"admitted"}
    before = [(one["site"], one["round"], one["staleness"], one["mechanism"]) for one in records[0]["carried"]]
    assert before == [("b", 1, 0, None)] * 3
    assert "carried" not in records[1]
    assert epsilon_by_site(records, config) == {}
    assert all(one["bytes_down"] for one in records[0]["carried"])


def test_extension_ends_though_sites_fail_over_and_over(make_config: MakeConfig) -> None:
    config = make_config(federation={"below_min": "extend", "extension_s": 100.0, "min_sites": 2})
    with pytest.raises(RunError, match=r"1 usable updates; expected at least 2 .* 'b', Flower error 5"):
        play(config, "ab", lambda site, number, now: (0.5, FAILS) if site == "b" else 1.0)


def test_extension_does_not_wait_for_sites_whose_updates_are_bad(make_config: MakeConfig) -> None:
    config = make_config(
        federation={"below_min": "extend", "extension_s": 1e6, "min_sites": 2}, aggregation={"max_update_norm": 1e-3}
    )
    with pytest.raises(RunError, match="0 usable updates"):
        play(config, "ab", lambda site, number, now: 1.0)


def test_async_asks_every_site_about_as_often_where_fewer_may_work(make_config: MakeConfig) -> None:
    config = make_config(federation={"mode": "async", "buffer_size": 2, "sites_per_round": 6, "rounds": 120})
    grid, _ = play(config, TWELVE, lambda site, number, now: 10.0 + ((TWELVE.index(site) + 5 * number) % 7) / 2)
    asked = Counter(site for site, _, _ in grid.asked)
    assert set(asked) == set(TWELVE)
    assert min(asked.values()) > max(asked.values()) / 2
    assert grid.most == 1


def test_site_at_work_is_not_asked_again_before_its_time_is_over(make_config: MakeConfig) -> None:
    federation = {"mode": "async", "buffer_size": 1, "max_staleness": 2, "rounds": 60, "round_timeout_s": 600.0}
    config = make_config(federation=federation)
    grid, records = play(config, TWELVE, lambda site, number, now: 10.0 + TWELVE.index(site) / 2)
    assert grid.most == 1
    stale = [one for record in records for one in record["carried"] if one["status"] == "late"]
    assert stale
    assert all(one["staleness"] > 2 and "max_staleness" in one["reason"] and one["bytes_up"] for one in stale)
    assert sum(counted(records).values()) == 60
    (warning,) = round_warnings(config, 12)
    assert "12 rounds after they were asked" in warning
    assert round_warnings(config, 2) == ()


def test_site_that_does_not_answer_in_its_time_is_asked_again(make_config: MakeConfig) -> None:
    federation = {"mode": "async", "buffer_size": 1, "max_staleness": 2, "rounds": 60, "round_timeout_s": 20.0}
    grid, _ = play(make_config(federation=federation), "abc", lambda site, number, now: 1e9 if site == "c" else 1.0)
    times = [now for site, _, now in grid.asked if site == "c"]
    assert times[:2] == [0, 20]
    assert all(later - earlier >= 20 for earlier, later in pairwise(times))


def test_request_expires_when_nobody_waits_for_it_any_more(make_config: MakeConfig) -> None:
    identify_process()

    def seconds(**federation: object) -> set[float]:
        config = make_config(federation=federation)
        current = make_round(config)
        return {round(one.metadata.ttl) for one in requests(current, config, 60.0, current.cohort).values()}

    assert seconds() == {70}
    assert seconds(below_min="extend", extension_s=600.0) == {670}
    assert seconds(late="carry", max_staleness=3) == {250}
    assert seconds(late="carry", max_staleness=3, below_min="extend", extension_s=40.0) == {410}


def test_spare_site_is_busy_until_it_answers_and_its_bytes_are_counted(make_config: MakeConfig) -> None:
    config = make_config(federation={"sites_per_round": 2, "over_select": 1.5, "rounds": 4})
    grid, records = play(config, "abc", lambda site, number, now: 2.5 if site == "c" else 1.0)
    assert [number for site, number, _ in grid.asked if site == "c"] == [1, 4]
    (third,) = [record["carried"] for record in records if "carried" in record]
    assert [(one["site"], one["round"], one["status"], one["mechanism"]) for one in third] == [("c", 1, "spare", None)]
    assert third[0]["bytes_up"] == records[0]["sites"]["a"]["bytes_up"]


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_failed_site_is_asked_again_though_another_is_silent(make_config: MakeConfig, late: str) -> None:
    federation = {
        "below_min": "extend", "extension_s": 300.0, "min_sites": 2, "rounds": 1, "round_timeout_s": 100.0,
        "late": late,
    }  # fmt: skip
    script = {"a": lambda now: 1.0, "b": lambda now: (0.5, FAILS) if now < 110 else 1.0, "c": lambda now: 1e9}
    grid, records = play(make_config(federation=federation), "abc", lambda site, number, now: script[site](now))
    times = [now for site, _, now in grid.asked if site == "b"]
    assert times == [0, 100, 110]
    assert records[0]["sites"]["b"]["status"] == "admitted"
    assert grid.clock.now() <= 400


def test_extension_does_not_wait_for_a_spare_site_of_an_earlier_round(make_config: MakeConfig) -> None:
    federation = {
        "sites_per_round": 2, "over_select": 1.5, "rounds": 3, "min_sites": 2, "below_min": "extend",
        "extension_s": 600.0,
    }  # fmt: skip
    config = make_config(federation=federation, aggregation={"max_update_norm": 2.0})
    asked: list[tuple[str, int, float]] = []

    def script(site: str, number: int, now: float) -> float:
        asked.append((site, number, now))
        return 1e9 if site == "c" else 1.0

    with pytest.raises(RunError, match="round 1 has 0 usable updates"):
        play(make_config(federation=federation, aggregation={"max_update_norm": 1e-3}), "ab", script)
    assert asked[-1][2] == 0
    grid, _ = play(config, "abc", script)
    assert grid.clock.now() < 10


def test_request_in_the_midst_of_an_async_round_lasts_as_long_as_any(make_config: MakeConfig) -> None:
    federation = {"mode": "async", "buffer_size": 2, "max_staleness": 8, "rounds": 2, "round_timeout_s": 600.0}
    config = make_config(federation=federation)
    grid, records = play(config, "abc", lambda site, number, now: {"a": 590.0, "b": 300.0, "c": 500.0}[site])
    assert [round(ttl) for _, _, ttl in grid.lasting] == [5410] * len(grid.lasting)
    assert ("b", 2, 500.0) in grid.asked
    assert grid.most == 1
    assert len(records) == 2


def test_pauses_stop_growing_and_end_with_the_run(make_config: MakeConfig) -> None:
    config = make_config(federation={"below_min": "skip", "rounds": 1100, "round_timeout_s": 1.0})
    _, records = play(config, "a", lambda site, number, now: (0.0, FAILS))
    assert len(records) == 1100

    class Operator(Steering):
        def proceed(self, number: int, grid: Any) -> bool:
            return number < 4

        def ends(self) -> bool:
            return True

    grid, records = play(config, "a", lambda site, number, now: (0.0, FAILS), steering=Operator())
    assert (len(records), grid.clock.now()) == (3, 0.0)


def test_nobody_sleeps_for_virtual_sites_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.clock.time, "sleep", lambda seconds: pytest.fail("slept"))
    clock = IdleClock()
    pause(Trickle(Seconds(), {}), clock, 1e6)
    assert clock.now() == 1e6
