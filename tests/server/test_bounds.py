"""Bounds on the norm of an update and on a site's share of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from common.tensors import Tensors
from server.admission import Admission
from server.bounds import capped
from server.cohort import Member
from server.rounds import Round
from tests.common.test_method_rules import config_of
from tests.server.test_late import answer
from tests.server.test_rounds import ADAPTER, BASE, RUN, UPDATE, description, make_round, reply_to

NORM = math.sqrt(12 * 0.25)
"""Of UPDATE: twelve entries of 1/2."""


def scaled(factor: float) -> bytes:
    return encode({name: value * factor for name, value in UPDATE.items()}, "fp32")


def played(config: RunConfig, factors: Mapping[str, float]) -> tuple[Round, Tensors]:
    """A round in which each site sends UPDATE times its factor."""
    current = make_round(config, tuple(factors))
    for site, factor in factors.items():
        current.take(site, reply_to(current, site), scaled(factor))
    return current, current.finish()


def test_absolute_bound_rejects_what_is_longer(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"max_update_norm": NORM * 2})
    current, adapter = played(config, {"one": 1.0, "two": 2.0001, "three": 1.9999})
    assert {site: o.status for site, o in current.outcomes.items()} == {
        "one": "admitted", "two": "rejected", "three": "admitted",
    }  # fmt: skip
    assert str(current.outcomes["two"].reason).startswith("norm:")
    torch.testing.assert_close(adapter["x.lora_A.weight"], ADAPTER["x.lora_A.weight"] + 0.5 * (1.0 + 1.9999) / 2)


@pytest.mark.parametrize("method", ["fedit", "flexlora"])
def test_bound_of_the_median_leaves_the_round_of_the_others(make_config: Callable[..., RunConfig], method: str) -> None:
    honest = {"one": 1.0, "two": 1.2, "three": 0.8, "four": -2.9}
    bounded = make_config(aggregation={"method": method, "norm_bound_of_median": 3.0})
    current, adapter = played(bounded, {"zero": 1000.0, **honest})
    assert current.outcomes["zero"].status == "rejected"
    assert str(current.outcomes["zero"].reason).startswith("norm: the update has norm 1.73e+03 and the cohort's median")
    assert current.count == 4
    _, alone = played(make_config(aggregation={"method": method}), honest)
    assert all(torch.equal(adapter[name], alone[name]) for name in alone)


def test_sites_that_agree_on_norms_all_pass_to_the_same_bits(make_config: Callable[..., RunConfig]) -> None:
    honest = {"one": 1.0, "two": 1.2, "three": 0.8}
    bounded, plain = make_config(aggregation={"norm_bound_of_median": 1.5}), make_config()
    (_, with_bound), (_, without) = played(bounded, honest), played(plain, honest)
    assert all(torch.equal(with_bound[name], without[name]) for name in without)


def test_update_beyond_the_median_counts_neither_to_close_nor_to_be_enough(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config(aggregation={"norm_bound_of_median": 2.0}, federation={"min_sites": 3})
    current = make_round(config, ("one", "two", "three"))
    for site, factor in {"one": 1.0, "two": 1.0, "three": 1000.0}.items():
        assert current.take(site, reply_to(current, site), scaled(factor)).status == "admitted"
    assert current.count == 2
    assert "2 usable updates; expected at least 3" in str(current.lacking())
    ((site, outcome),) = current.settle()
    assert (site, outcome.status, current.count) == ("three", "rejected", 2)
    assert "site 'three', norm:" in str(current.lacking())


def test_late_update_beyond_the_median_is_rejected_where_it_is_carried(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"norm_bound_of_median": 2.0}, federation={"late": "carry"})
    members = {site: Member(number, description(site)) for number, site in enumerate(("one", "two", "three", "four"))}

    def opened(number: int, *sites: str) -> Round:
        cohort = {site: members[site] for site in sites}
        return Round(number, cohort, ADAPTER, config, Admission.of(config), BASE, RUN, others=members)

    owed = opened(1, "four").asked["four"]
    current = opened(2, "one", "two", "three")
    for site in ("one", "two", "three"):
        current.take(site, answer(current.asked[site]), scaled(1.0))
    current.take_late(owed, answer(owed), scaled(1000.0))
    adapter = current.finish()
    torch.testing.assert_close(adapter["x.lora_A.weight"], ADAPTER["x.lora_A.weight"] + 0.5)
    (carried,) = current.record()["carried"]
    assert (carried["status"], carried["reason"][:5]) == ("rejected", "norm:")


WEIGHTS = st.lists(st.integers(1, 10**9), min_size=1, max_size=12)


@given(WEIGHTS, st.floats(0.05, 1.0))
def test_no_capped_weight_has_more_than_its_share(numbers: list[int], share: float) -> None:
    weights = {f"site {place}": float(number) for place, number in enumerate(numbers)}
    cut = capped(weights, share)
    largest = max(cut.values())
    assert largest / sum(cut.values()) <= max(share, 1 / len(cut)) * (1 + 1e-9)
    if len(set(cut.values())) > 1:  # else all may have become the same
        assert all(cut[site] in (weights[site], largest) and cut[site] <= weights[site] for site in cut)


@given(WEIGHTS)
def test_a_share_of_the_whole_cuts_nothing(numbers: list[int]) -> None:
    weights = {f"site {place}": float(number) for place, number in enumerate(numbers)}
    assert capped(weights, 1.0) == weights


def test_capped_weights_by_hand() -> None:
    assert capped({"a": 1.0, "b": 1.0, "c": 8.0}, 0.5) == {"a": 1.0, "b": 1.0, "c": 2.0}
    assert capped({"a": 1.0, "b": 9.0, "c": 90.0}, 0.4) == pytest.approx({"a": 1.0, "b": 2.0, "c": 2.0})
    assert capped({"a": 1.0, "b": 10.0}, 0.3) == {"a": 1.0, "b": 1.0}


def test_huge_declaration_is_cut_to_its_share(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"weights": "examples", "max_weight": 0.5})
    rows = {"one": 10, "two": 10, "three": 10**9}
    cohort = {site: Member(n, description(site, num_examples=count)) for n, (site, count) in enumerate(rows.items())}
    current = Round(1, cohort, ADAPTER, config, Admission.of(config), BASE, RUN)
    for site, factor in {"one": 1.0, "two": 1.0, "three": 3.0}.items():
        current.take(site, reply_to(current, site), scaled(factor))
    torch.testing.assert_close(current.finish()["x.lora_A.weight"], ADAPTER["x.lora_A.weight"] + 0.5 * 2.0)


@pytest.mark.parametrize("key", ["max_update_norm", "norm_bound_of_median"])
@pytest.mark.parametrize("privacy", [{"unit": "site"}, {"unit": "example", "site_level": {"epsilon": 3.0}}])
def test_norm_bounds_are_refused_under_site_level_privacy(key: str, privacy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"aggregation.{key} is set under site-level privacy"):
        config_of("fedit", privacy=privacy, aggregation={key: 5.0})


@pytest.mark.parametrize("method", METHODS)
def test_norm_bounds_go_with_every_method(method: str) -> None:
    config_of(method, aggregation={"method": method, "max_update_norm": 5.0, "norm_bound_of_median": 3.0})


def test_weight_cap_needs_weights() -> None:
    with pytest.raises(ConfigError, match="where all count the same"):
        config_of("fedit", aggregation={"max_weight": 0.5})
