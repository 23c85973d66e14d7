"""Updates that come after their round: checked against their own request, damped, counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.wire import TrainReply, TrainRequest, header_bytes, parse_header
from server.admission import Admission
from server.cohort import Member
from server.late import Asked, damped
from server.rounds import Round
from tests.server.test_rounds import ADAPTER, BASE, RUN, UPDATE, description

MEMBERS = {site: Member(number, description(site)) for number, site in enumerate(("one", "two", "three"))}


def open_round(config: RunConfig, number: int, *sites: str) -> Round:
    cohort = {site: MEMBERS[site] for site in sites}
    return Round(number, cohort, ADAPTER, config, Admission.of(config), BASE, RUN, others=MEMBERS)


def answer(asked: Asked, **changes: Any) -> bytes:
    request = parse_header(header_bytes(asked.request), TrainRequest)
    assert isinstance(request, TrainRequest)
    known: dict[str, Any] = {
        "site": asked.member.name, "round": request.round, "nonce": request.nonce, "base_fingerprint": BASE,
        "steps": 3, "train_loss": 0.7, "mechanism": None,
    }  # fmt: skip
    return header_bytes(TrainReply(**{**known, **changes}))


@given(st.integers(0, 16), st.floats(0.0, 3.0))
def test_damping_is_the_power_of_one_plus_staleness(staleness: int, exponent: float) -> None:
    (got,) = damped({"a": torch.tensor([3.0])}, staleness, exponent).values()
    assert float(got) == pytest.approx(3.0 / (1 + staleness) ** exponent, rel=1e-6)


def test_update_in_time_keeps_its_bits() -> None:
    value = torch.randn(100)
    assert torch.equal(damped({"a": value}, 0, 0.5)["a"], value)


def test_site_whose_name_reads_like_a_late_update_is_counted_beside_it(make_config: Callable[..., RunConfig]) -> None:
    alike = "three, round 1"
    member = Member(9, description(alike))
    for bounds in ({"norm_bound_of_median": 5.0}, {"robust": "median"}):
        config = make_config(federation={"late": "carry"}, aggregation=bounds)
        owed = open_round(config, 1, "three").asked["three"]
        cohort = {alike: member, "one": MEMBERS["one"], "two": MEMBERS["two"]}
        current = Round(2, cohort, ADAPTER, config, Admission.of(config), BASE, RUN, others={**MEMBERS, **cohort})
        assert current.take_late(owed, answer(owed), encode(UPDATE, "fp32")).status == "admitted"
        for site in cohort:
            current.take(site, answer(current.asked[site]), encode(UPDATE, "fp32"))
        assert current.count == 4
        current.finish()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_late_update_counts_beside_the_round_as_the_formula_says(
    make_config: Callable[..., RunConfig], exponent: float
) -> None:
    config = make_config(federation={"late": "carry", "staleness_exponent": exponent})
    owed = open_round(config, 1, "three").asked["three"]
    current = open_round(config, 4, "one")
    payload = encode(UPDATE, "fp32")
    current.take("one", answer(current.asked["one"]), payload)
    assert current.take_late(owed, answer(owed), payload).status == "admitted"
    factor = (1 + 4.0**-exponent) / 2
    for name, value in current.finish().items():
        torch.testing.assert_close(value, ADAPTER[name] + factor * UPDATE[name])
    (carried,) = current.record()["carried"]
    assert (carried["site"], carried["round"], carried["staleness"]) == ("three", 1, 3)
    assert carried["mechanism"] is None


def test_late_update_is_checked_against_the_request_of_its_own_round(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(federation={"late": "carry"})
    owed = open_round(config, 1, "three").asked["three"]
    current = open_round(config, 2, "one", "two")
    payload = encode(UPDATE, "fp32")
    for changes, reason in (
        ({"nonce": current.asked["one"].request.nonce}, "nonce:"),
        ({"round": 2}, "round:"),
        ({"site": "one"}, "site:"),
    ):
        outcome = current.take_late(owed, answer(owed, **changes), payload)
        assert (outcome.status, str(outcome.reason).split(" ")[0]) == ("rejected", reason)
    # What answers the old request is no answer to the new one.
    other = open_round(config, 2, "three")
    assert str(other.take("three", answer(owed), payload).reason).startswith("round:")
    assert current.count == other.count == 0


def test_skipped_round_leaves_the_adapter_and_counts_nothing(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(federation={"late": "carry", "min_sites": 3, "below_min": "skip"})
    owed = open_round(config, 1, "three").asked["three"]
    current = open_round(config, 2, "one", "two")
    payload = encode(UPDATE, "fp32")
    current.take("one", answer(current.asked["one"]), payload)
    current.take_late(owed, answer(owed), payload)
    lacking = current.lacking()
    assert lacking is not None
    assert "2 usable updates; expected at least 3" in lacking
    assert all(torch.equal(value, ADAPTER[name]) for name, value in current.skip(lacking).items())
    record = current.record()
    assert {site: o["status"] for site, o in record["sites"].items()} == {"one": "dropped", "two": "late"}
    assert record["carried"][0]["status"] == "dropped"
    assert record["skipped"] == lacking


def test_record_without_late_updates_has_the_keys_it_always_had(make_config: Callable[..., RunConfig]) -> None:
    current = open_round(make_config(), 1, "one")
    assert current.record().keys() == {"kind", "round", "sites", "products", "seconds"}
