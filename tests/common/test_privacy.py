from __future__ import annotations

from collections.abc import Callable

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp

from common.config.run import RunConfig
from common.errors import PrivacyError
from common.privacy.accounting import Segment, calibrate_noise, epsilon_spent, merge
from common.privacy.claim import privacy_claim
from common.privacy.planning import plan_mechanism, steps_per_round


def pld_epsilon(segments: list[Segment], delta: float) -> float:
    """ε by an independent implementation: privacy loss distributions of dp_accounting."""
    accountant = PLDAccountant()
    for s in segments:
        step = dp_event.PoissonSampledDpEvent(s.sample_rate, dp_event.GaussianDpEvent(s.noise_multiplier))
        accountant.compose(dp_event.SelfComposedDpEvent(step, s.steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(1.0, 0.1, 60)],
        [Segment(0.8, 0.04, 125)],
        [Segment(2.0, 0.2, 50), Segment(1.5, 0.1, 30)],
        [Segment(4.0, 1.0, 10)],
    ],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-6])
def test_epsilon_is_never_below_and_hardly_above_an_independent_bound(segments: list[Segment], delta: float) -> None:
    exact = pld_epsilon(segments, delta)
    assert exact - 1e-3 <= epsilon_spent(segments, delta) <= exact * 1.01 + 0.011
    assert epsilon_spent(segments, delta, "rdp") >= exact


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("target", [1.0, 8.0])
def test_calibrated_noise_meets_the_target_from_below(target: float, accountant: str) -> None:
    noise = calibrate_noise(target, 1e-5, 0.1, 60, accountant)
    spent = epsilon_spent([Segment(noise, 0.1, 60)], 1e-5, accountant)
    assert target - 0.011 <= spent <= target


def test_epsilon_beyond_use_is_that_of_rdp_and_grows_with_steps() -> None:
    found = {
        accountant: [epsilon_spent([Segment(1.0, 0.5, steps)], 1e-3, accountant) for steps in (150, 175, 200, 100_000)]
        for accountant in ("prv", "rdp")
    }
    assert found["prv"][0] < found["rdp"][0] < 50
    assert found["prv"][-1] == found["rdp"][-1] > 50
    assert found["prv"] == sorted(found["prv"])


@pytest.mark.parametrize("sample_rate", [1e-9, 1e-6, 1e-4])
def test_epsilon_of_more_steps_than_prv_is_asked_for_is_that_of_rdp(sample_rate: float) -> None:
    few, many = 100, 20_000_000  # of which the second took PRV minutes
    found = {
        accountant: [epsilon_spent([Segment(1.0, sample_rate, steps)], 1e-5, accountant) for steps in (few, many)]
        for accountant in ("prv", "rdp")
    }
    assert found["prv"][0] < found["rdp"][0]
    assert found["prv"][1] == found["rdp"][1]


def test_small_epsilon_is_planned_where_rdp_has_no_answer() -> None:
    noise = calibrate_noise(0.05, 1e-5, 0.05, 20)
    assert epsilon_spent([Segment(noise, 0.05, 20)], 1e-5) <= 0.05
    with pytest.raises(PrivacyError, match="larger ε"):
        calibrate_noise(0.05, 1e-5, 0.05, 20, "rdp")


@given(st.lists(st.builds(Segment, st.sampled_from([1.0, 2.0]), st.sampled_from([0.1, 0.2]), st.integers(0, 9))))
def test_merge_keeps_steps_and_forgets_order(segments: list[Segment]) -> None:
    assert sum(s.steps for s in merge(segments)) == sum(s.steps for s in segments)
    assert merge(segments) == merge(segments[::-1])
    assert len(merge(segments)) <= 4


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200))
def test_more_steps_spend_more(steps: int) -> None:
    few, more = (epsilon_spent([Segment(1.2, 0.05, n)], 1e-5, "rdp") for n in (steps, steps + 10))
    assert few < more


def test_nothing_done_spends_nothing_and_no_noise_is_refused() -> None:
    assert epsilon_spent([], 1e-5) == 0.0
    with pytest.raises(PrivacyError):
        epsilon_spent([Segment(0.0, 0.1, 5)], 1e-5)
    with pytest.raises(PrivacyError):
        epsilon_spent([Segment(1.0, 1.5, 5)], 1e-5)


def test_bounds_of_a_step_are_computed_once_for_any_number_of_steps() -> None:
    epsilon_spent([Segment(1.23, 0.0456, 7)], 1e-5)
    known = rdp._compute_rdp.cache_info()
    more = epsilon_spent([Segment(1.23, 0.0456, 700)], 1e-5)
    after = rdp._compute_rdp.cache_info()
    assert after.hits > known.hits
    assert after.misses == known.misses
    assert more == pytest.approx(pld_epsilon([Segment(1.23, 0.0456, 700)], 1e-5), rel=0.02)


def test_plan_counts_every_round_and_divides_by_the_expected_batch(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "example", "epsilon": 4.0}, federation={"rounds": 3})
    mechanism = plan_mechanism(config, 40)
    assert mechanism is not None
    assert mechanism.sample_rate == 4 / 40
    assert mechanism.steps_per_round == 10
    assert mechanism.expected_batch_size == 4
    assert 3.98 <= mechanism.epsilon_after(3) <= 4.0
    assert mechanism.epsilon_after(1) < mechanism.epsilon_after(2)
    assert plan_mechanism(make_config(), 40) is None


@given(units=st.integers(1, 5000), batch=st.integers(1, 64), epochs=st.sampled_from([0.1, 0.5, 1.0, 1.7, 3.0]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_planned_passes_are_whole_at_a_rate_of_at_most_a_batch(
    make_config: Callable[..., RunConfig], units: int, batch: int, epochs: float
) -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-6}
    config = make_config(privacy=privacy, training={"batch_size": batch, "local_epochs": epochs})
    mechanism = plan_mechanism(config, units)
    assert mechanism is not None
    assert mechanism.sample_rate * mechanism.steps_per_round == pytest.approx(epochs)
    assert mechanism.sample_rate <= min(1.0, batch / units) * (1 + 1e-6)
    assert mechanism.steps_per_round == steps_per_round(config, 1.0 / mechanism.sample_rate)


def test_plan_with_a_shared_rate_does_not_depend_on_the_site(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "example", "sample_rate": 0.1, "noise_multiplier": 1.0})
    small, large = plan_mechanism(config, 50), plan_mechanism(config, 5000)
    assert small is not None
    assert large is not None
    assert small.segment() == large.segment()
    assert large.expected_batch_size == 500


def test_delta_too_large_for_the_site_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "example", "delta": 0.1})
    with pytest.raises(PrivacyError, match=r"expected at most 0\.003"):
        plan_mechanism(config, 40)


def test_claim_names_unit_neighbours_accountant_and_trust(make_config: Callable[..., RunConfig]) -> None:
    claim = privacy_claim(make_config(privacy={"unit": "example", "epsilon": 2.0}), repeatable_noise=True)
    for word in ("ε ≤ 2", "δ = 1e-05", "adding or removing one record", "PRV", "trust", "Poisson", "simulation"):
        assert word in claim
    assert "No differential privacy" in privacy_claim(make_config(), repeatable_noise=False)
