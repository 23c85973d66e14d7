"""Who is there, by hand and by count. The statistical tests have fixed seeds; each would fail by chance once in 10⁵."""

from __future__ import annotations

import math

import pytest

from common.config.simulation import ChurnConfig, SimulationConfig, StaleConfig, WindowConfig
from simulations.faults.availability import drops_out, in_window, is_present, is_there, rounds_late

SITES = [f"site {number}" for number in range(2000)]
DEVIATIONS = 4.42
"""Two-sided normal quantile for an error rate of 1e-5."""


def expect_share(count: int, of: int, share: float) -> None:
    assert abs(count - of * share) <= DEVIATIONS * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropouts_are_as_frequent_as_configured_and_independent_between_rounds(probability: float) -> None:
    first = [drops_out(probability, 3, 1, site) for site in SITES]
    second = [drops_out(probability, 3, 2, site) for site in SITES]
    expect_share(sum(first), len(SITES), probability)
    expect_share(sum(a and b for a, b in zip(first, second, strict=True)), len(SITES), probability**2)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_dropout_of_probability_zero_never_happens_and_of_one_always(probability: float) -> None:
    assert {drops_out(probability, 0, number, site) for site in SITES[:50] for number in (1, 2)} == {bool(probability)}


def test_churn_keeps_its_stationary_share_and_its_transition_rates() -> None:
    churn = ChurnConfig(leave=0.2, join=0.6)
    states = [[is_present(churn, 1, number, site) for number in (1, 4, 5)] for site in SITES]
    for place in range(3):
        expect_share(sum(state[place] for state in states), len(SITES), 0.75)
    there = [state for state in states if state[1]]
    gone = [state for state in states if not state[1]]
    expect_share(sum(not state[2] for state in there), len(there), 0.2)
    expect_share(sum(state[2] for state in gone), len(gone), 0.6)


def test_churn_that_always_switches_alternates() -> None:
    states = [is_present(ChurnConfig(leave=1.0, join=1.0), 1, number, "a") for number in range(1, 7)]
    assert states in ([True, False] * 3, [False, True] * 3)


def test_windows_say_in_which_rounds_a_site_is_there() -> None:
    windows = (
        WindowConfig(site="late", from_round=3),
        WindowConfig(site="twice", to_round=1),
        WindowConfig(site="twice", from_round=4, to_round=4),
    )
    there = {site: [n for n in range(1, 6) if in_window(windows, n, site)] for site in ("late", "twice", "other")}
    assert there == {"late": [3, 4, 5], "twice": [1, 4], "other": [1, 2, 3, 4, 5]}


def test_updates_are_late_as_often_as_configured_and_by_so_many_rounds() -> None:
    config = SimulationConfig(stale=StaleConfig(probability=0.3, rounds=2))
    late = [rounds_late(config, 0, 1, site) for site in SITES]
    assert set(late) == {0, 2}
    expect_share(late.count(2), len(late), 0.3)
    assert rounds_late(SimulationConfig(), 0, 1, "a") == 0


def test_draws_do_not_depend_on_the_order_of_asking_and_differ_between_seeds() -> None:
    config = SimulationConfig(churn=ChurnConfig(leave=0.3, join=0.3))
    asked = [(number, site) for number in range(1, 9) for site in SITES[:20]]
    in_order = {key: is_there(config, 5, *key) for key in asked}
    is_present.cache_clear()
    asked.reverse()
    assert {key: is_there(config, 5, *key) for key in asked} == in_order
    assert {key: is_there(config, 6, *key) for key in asked} != in_order
