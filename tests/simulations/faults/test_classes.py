from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.simulation import AttackConfig, ProfileConfig, SimulationConfig
from common.errors import ConfigError
from simulations.faults.classes import apportion, hostile_sites, profiles_of

SITES = [f"site {number}" for number in range(8)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_apportioned_numbers_add_up_and_are_off_by_less_than_one(parts: list[int], total: int) -> None:
    shares = [part / sum(parts) for part in parts]
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(
    ("shares", "total", "counts"), [([0.5, 0.5], 8, [4, 4]), ([0.7, 0.2, 0.1], 8, [6, 1, 1]), ([1.0], 3, [3])]
)
def test_apportioned_numbers_by_hand(shares: list[float], total: int, counts: list[int]) -> None:
    assert apportion(shares, total) == counts


def test_named_sites_have_their_profile_and_the_rest_is_dealt_by_share() -> None:
    config = SimulationConfig(
        profiles=(
            ProfileConfig(name="own", sites=("site 3",)),
            ProfileConfig(name="fast", share=0.7),
            ProfileConfig(name="slow", share=0.3),
        )
    )
    found = profiles_of(config, SITES, 0)
    names = [found[site].name for site in SITES]
    assert found["site 3"].name == "own"
    assert (names.count("fast"), names.count("slow")) == (5, 2)
    assert profiles_of(config, SITES[::-1], 0) == found
    dealt = {tuple(profiles_of(config, SITES, seed)[site].name for site in SITES) for seed in range(8)}
    assert len(dealt) > 1


def test_unknown_site_and_site_without_profile_are_refused() -> None:
    wrong = SimulationConfig(profiles=(ProfileConfig(name="own", sites=("site 33",)),))
    with pytest.raises(ConfigError, match=r"names site 'site 33'; expected one of the data's sites, such as 'site 3'"):
        profiles_of(wrong, SITES, 0)
    partly = SimulationConfig(profiles=(ProfileConfig(name="own", sites=("site 3",)),))
    with pytest.raises(ConfigError, match="no profile for site 'site 0'"):
        profiles_of(partly, SITES, 0)


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (1.0, 8), (0.07, 1)])
def test_share_of_hostile_sites_is_rounded(share: float, count: int) -> None:
    attack = AttackConfig(name="nan", share=share)
    chosen = hostile_sites(attack, 0, SITES, 0)
    assert len(chosen) == count == math.floor(share * 8 + 0.5)
    assert chosen == hostile_sites(attack, 0, SITES[::-1], 0)


def test_hostile_share_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="is none"):
        hostile_sites(AttackConfig(name="nan", share=0.01), 0, SITES, 0)
    with pytest.raises(ConfigError, match="names site 'x'"):
        hostile_sites(AttackConfig(name="nan", sites=("x",)), 0, SITES, 0)
