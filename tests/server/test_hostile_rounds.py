"""What one bad site can do to a round that is not in its update: end it, count twice, move everybody's clip norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.wire import MechanismReport
from server.admission import Admission
from server.aggregation.robust import expect_enough_sites, held_against
from server.bounds import LONGEST_PRODUCT, beyond_use
from server.cohort import Member
from server.rounds import Round
from server.steering import Steering
from server.turns import Turns
from tests.server.scripted import play
from tests.server.test_rounds import ADAPTER, BASE, RUN, UPDATE, description, make_round, reply_to

SEVEN = tuple("abcdefg")


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
def test_junk_does_not_end_a_round_of_as_many_sites_as_the_rule_needs(
    make_config: Callable[..., RunConfig], rule: str
) -> None:
    current = make_round(make_config(aggregation={"robust": rule, "robust_sites": 2}), SEVEN)
    for site in SEVEN[1:]:
        current.take(site, reply_to(current, site), encode(UPDATE, "fp32"))
    assert current.lacking() is not None  # six sites, two of which may be bad
    current.take("a", b"junk", b"")
    assert (current.outcomes["a"].status, current.hidden, current.lacking()) == ("rejected", 1, None)
    for name, value in current.finish().items():
        torch.testing.assert_close(value, ADAPTER[name] + UPDATE[name])


def test_site_that_is_merely_broken_does_not_switch_the_rule_off_for_a_hostile_one(
    make_config: Callable[..., RunConfig],
) -> None:
    spread = {site: {name: (1 + 0.01 * place) * v for name, v in UPDATE.items()} for place, site in enumerate(SEVEN)}
    spread["b"] = {name: -1000.0 * value for name, value in UPDATE.items()}
    for rule in ("krum", "multi_krum", "trimmed_mean"):
        current = make_round(make_config(aggregation={"robust": rule, "robust_sites": 1}), SEVEN)
        for site in SEVEN[1:]:
            current.take(site, reply_to(current, site), encode(spread[site], "fp32"))
        current.take("a", b"junk", b"")
        assert current.hidden == 0
        after = current.finish()
        for name, value in ADAPTER.items():
            assert 0.49 < float((after[name] - value).mean()) < 0.54, rule


def test_site_found_out_by_a_late_answer_gets_no_vote_in_the_round(make_config: Callable[..., RunConfig]) -> None:
    federation = {"mode": "async", "buffer_size": 3}
    config = make_config(aggregation={"robust": "median", "robust_sites": 1}, federation=federation)
    earlier = make_round(config, SEVEN[:3])
    present = {"b": earlier.cohort["b"]}
    current = Round(2, present, ADAPTER, config, Admission.of(config), BASE, RUN, others=earlier.cohort)
    turns = Turns(config, Steering(), None)
    turns.draw(2, SEVEN[:3], set())
    assert current.take_late(earlier.asked["a"], b"junk", b"").status == "rejected"
    assert (current.found_out, current.hidden) == ({"a"}, 0)
    assert turns.free(set(), current) == ["c"]
    current.invite(earlier.cohort["a"])  # as it was before it was found out
    current.take("a", reply_to(current, "a", round=2), encode(UPDATE, "fp32"))
    assert (current.outcomes["a"].status, current.hidden) == ("admitted", 1)


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "norm_clip", "median"])
def test_record_tells_what_a_rule_counted_each_site(make_config: Callable[..., RunConfig], rule: str) -> None:
    current = make_round(make_config(aggregation={"robust": rule, "robust_sites": 1}), SEVEN)
    for place, site in enumerate(SEVEN):
        size = 50.0 if site == "b" else 1 + 0.01 * place
        sent = {name: size * value for name, value in UPDATE.items()}
        current.take(site, reply_to(current, site), encode(sent, "fp32"))
    assert "robust_shares" not in current.record()
    current.finish()
    if rule == "median":
        assert "robust_shares" not in current.record()
        return
    shares = current.record()["robust_shares"]
    assert sorted(shares) == sorted(SEVEN)
    assert shares["b"] < (0.01 if rule == "norm_clip" else 1e-9)
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "flora", "flexlora", "fedsvd"])
def test_values_that_no_site_could_go_on_from_are_the_fault_of_their_own_site_alone(
    make_config: Callable[..., RunConfig], method: str
) -> None:
    config = make_config(aggregation={"method": method}, adapter={"rank": 2, "alpha": 4})
    current = make_round(config, SEVEN)
    sent = {name: value for name, value in UPDATE.items() if name in current.asked["a"].manifest}
    for site in SEVEN:
        update = {name: 5e4 * value for name, value in sent.items()} if site == "a" else sent
        current.take(site, reply_to(current, site), encode(update, "fp32"))
    assert str(current.outcomes["a"].reason).startswith("range: the site's own adapter has values beyond")
    assert (current.count, current.hidden) == (6, 0)
    after = current.finish()
    assert current.unusable(after) is None


@pytest.mark.parametrize(
    ("rule", "hidden", "wanted", "sites", "found"),
    [("multi_krum", 0, 1, 5, 1), ("multi_krum", 0, 1, 4, 0), ("krum", 1, 3, 7, 2), ("krum", 2, 3, 20, 3),
     ("trimmed_mean", 0, 2, 4, 1), ("median", 0, 1, 1, 0), ("trimmed_mean", 0, 0, 9, 0)],
)  # fmt: skip
def test_rule_holds_against_as_many_as_its_sites_outvote(
    rule: str, hidden: int, wanted: int, sites: int, found: int
) -> None:
    assert held_against(rule, hidden, wanted, sites) == found
    expect_enough_sites(rule, found, sites, "a round")


def test_refusal_and_loss_say_nothing_against_a_site(make_config: Callable[..., RunConfig]) -> None:
    current = make_round(make_config(aggregation={"robust": "krum", "robust_sites": 2}), SEVEN)
    refusal = b'{"kind":"refusal","protocol":1,"code":"policy","place":""}'
    assert str(current.take("a", refusal, b"").reason).startswith("refused")
    current.fail("b", "failed", "Flower error 5")
    assert current.hidden == 2


def test_update_that_is_merely_long_leaves_its_site_among_the_suspects(make_config: Callable[..., RunConfig]) -> None:
    bounded = {"robust": "krum", "robust_sites": 2, "max_update_norm": 0.1}
    current = make_round(make_config(aggregation=bounded), SEVEN)
    assert str(current.take("a", reply_to(current, "a"), encode(UPDATE, "fp32")).reason).startswith("norm")
    assert current.hidden == 2


def test_site_found_out_only_when_updates_are_added_needs_no_others_to_outvote_it(
    make_config: Callable[..., RunConfig],
) -> None:
    settings = {"robust": "krum", "robust_sites": 2, "norm_bound_of_median": 1e9}
    config = make_config(aggregation=settings, adapter={"rank": 2, "alpha": 4})
    current = make_round(config, SEVEN)
    unusable = {name: torch.full_like(value, 9e4) for name, value in UPDATE.items()}
    for site in SEVEN:
        current.take(site, reply_to(current, site), encode(unusable if site == "a" else UPDATE, "fp32"))
    assert [(site, outcome.status) for site, outcome in current.settle()] == [("a", "rejected")]
    assert (current.hidden, current.lacking()) == (1, None)


def test_layer_that_no_base_model_stands_is_found_though_each_value_is_small_enough() -> None:
    wide = {"x.lora_A.weight": torch.full((2, 64), 9000.0), "x.lora_B.weight": torch.full((64, 2), 9000.0)}
    assert "no base model stands" in str(beyond_use(wide))
    assert beyond_use(wide | {"x.lora_B.weight": torch.full((64, 2), 1e-6 * LONGEST_PRODUCT / 9000)}) is None
    assert "no site takes" in str(beyond_use({"head.weight": torch.full((2, 2), 9900.0)}))


@pytest.mark.parametrize("told", [1e8, 1e-8])
def test_clip_norm_that_one_site_tells_moves_nobodys_beyond_the_others(
    make_config: Callable[..., RunConfig], told: float
) -> None:
    private = {"unit": "example", "noise_multiplier": 1.0, "clipping": "adaptive", "clip_norm": 0.1}
    config = make_config(privacy=private)
    mechanism = MechanismReport(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    cohort = {
        site: Member(number, description(site, num_examples=None, mechanism=mechanism))
        for number, site in enumerate("abcde")
    }
    current = Round(1, cohort, ADAPTER, config, Admission.of(config), BASE, RUN, 0.1)
    norms = dict(zip("abcde", (told, 0.09, 0.1, 0.11, 0.12), strict=True))
    for site, norm in norms.items():
        reply = reply_to(current, site, train_loss=None, mechanism=mechanism, clip_norm=norm)
        assert current.take(site, reply, encode(UPDATE, "fp32")).status == "admitted"
    assert current.clip_norm() == pytest.approx(0.11 if told > 1 else 0.1)


@pytest.mark.parametrize(("sent", "told"), [(0.1, 1e8), (0.1, 1e-8), (0.99e8, 1e8), (1.01e-8, 1e-8)])
def test_clip_norm_of_a_site_alone_stays_within_what_its_steps_can_do(
    make_config: Callable[..., RunConfig], sent: float, told: float
) -> None:
    private = {"unit": "example", "noise_multiplier": 1.0, "clipping": "adaptive", "clip_norm": 0.1, "clip_lr": 0.2}
    config = make_config(privacy=private)
    mechanism = MechanismReport(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    alone = {"a": Member(1, description("a", num_examples=None, mechanism=mechanism))}
    current = Round(1, alone, ADAPTER, config, Admission.of(config), BASE, RUN, sent)
    reply = reply_to(current, "a", train_loss=None, mechanism=mechanism, clip_norm=told)
    assert current.take("a", reply, encode(UPDATE, "fp32")).status == "admitted"
    after = current.clip_norm()
    assert after is not None
    assert math.exp(-1.0001) <= after / sent <= math.exp(1.0001)
    Round(2, alone, ADAPTER, config, Admission.of(config), BASE, RUN, after).request("a")


def test_site_whose_late_answer_counts_in_a_round_has_no_second_vote_in_it(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config(federation={"mode": "async", "buffer_size": 3, "sites_per_round": 4, "rounds": 2})
    delays = {("a", 1): 10.0, ("a", 2): 0.5, **{(site, 2): 20.0 for site in "bcd"}}
    _, records = play(config, "abcd", lambda site, number, now: delays.get((site, number), 1.0))
    counted = [site for site, outcome in records[1]["sites"].items() if outcome["status"] == "admitted"]
    counted += [one["site"] for one in records[1]["carried"]]
    assert (len(counted), len(set(counted)), "a" in counted) == (3, 3, True)
