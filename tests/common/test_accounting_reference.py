"""ε against an independent implementation: the privacy loss distributions of dp_accounting, on fifty settings.

The reference is dp_accounting's pessimistic estimate (connect-the-dots, Doroshenko et al. 2207.04380), the larger of
adding and removing a record. It is above the truth by its own discretisation slack, which falls with the square of the
interval h: from 1e-3 to 1e-4 by a factor of 100, so that (ε(1e-3) - ε(1e-4)) / 99 estimates what is left at 1e-4.
Over the fifty settings that is at most 3e-4, and the accountant must not use it: it may be nowhere below the reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.optimize import brentq
from scipy.stats import norm

from common.privacy.accounting import Segment, epsilon_spent

SETTINGS = 50
COARSE, FINE = 1e-3, 1e-4
LOWEST, HIGHEST = 0.05, 30.0
MOST_ABOVE, MOST_ABOVE_TINY = 0.01, 0.0015
"""Relative, or absolute where that is more (below ε = 0.15)."""

Setting = tuple[tuple[Segment, ...], float]


def pld_epsilon(segments: tuple[Segment, ...], delta: float, interval: float, *, pessimistic: bool = True) -> float:
    """ε by dp_accounting; the optimistic estimate rounds every privacy loss down to a multiple of the interval."""
    composed: Any = None
    for segment in segments:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            segment.noise_multiplier, value_discretization_interval=interval, sampling_prob=segment.sample_rate,
            pessimistic_estimate=pessimistic, use_connect_dots=pessimistic,
        ).self_compose(segment.steps)  # fmt: skip
        composed = one if composed is None else composed.compose(one)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache
def setting(number: int) -> tuple[Setting, float]:
    """The first sensible setting of a seeded stream, and its ε at the coarse interval.

    σ in [0.6, 20], q in [0.005, 1] and steps in [1, 5000] log-uniform, δ = 10^-u with u uniform in [5, 8]; one segment,
    two or three. Sensible is an ε in [0.05, 30].
    """
    stream = np.random.default_rng([20, number])

    def between(low: float, high: float) -> float:
        return float(np.exp(stream.uniform(np.log(low), np.log(high))))

    while True:
        segments = tuple(
            Segment(round(between(0.6, 20.0), 3), round(between(0.005, 1.0), 4), round(between(1, 5000)))
            for _ in range(stream.choice([1, 1, 2, 3]))
        )
        delta = float(10 ** -stream.uniform(5, 8))
        found = pld_epsilon(segments, delta, COARSE)
        if LOWEST <= found <= HIGHEST:
            return (segments, delta), found


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.slow if number >= 5 else ()) for number in range(SETTINGS)]
)
def test_epsilon_is_never_below_and_at_most_one_percent_above_the_reference(number: int) -> None:
    (segments, delta), coarse = setting(number)
    reference = pld_epsilon(segments, delta, FINE)
    spent = epsilon_spent(segments, delta)
    assert (coarse - reference) / 99 < 3e-4
    assert reference <= spent <= max(reference * (1 + MOST_ABOVE), reference + MOST_ABOVE_TINY)


def test_reference_is_bracketed_by_its_own_optimistic_estimate() -> None:
    """Rounding down loses at most the interval a step, so that truth and reference lie in that gap."""
    segments, delta = (Segment(1.1, 0.1, 20),), 1e-6
    pessimistic = pld_epsilon(segments, delta, FINE)
    optimistic = pld_epsilon(segments, delta, FINE, pessimistic=False)
    assert optimistic <= pessimistic <= optimistic + 20 * FINE
    assert optimistic <= epsilon_spent(segments, delta)


@pytest.mark.parametrize(("noise", "steps"), [(20.0, 1), (20.0, 30), (5.0, 12), (2.0, 20)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_epsilon_without_sampling_is_that_of_the_gaussian_mechanism(noise: float, steps: int, delta: float) -> None:
    """q = 1: n steps are one Gaussian mechanism of σ/√n, whose ε solves δ = Φ(1/2s - εs) - e^ε Φ(-1/2s - εs)."""
    s = noise / steps**0.5

    def excess(epsilon: float) -> float:
        below = np.exp(epsilon + norm.logcdf(-0.5 / s - epsilon * s))
        return float(norm.cdf(0.5 / s - epsilon * s) - below - delta)

    exact = brentq(excess, 0.0, 200.0, xtol=1e-12)
    spent = epsilon_spent([Segment(noise, 1.0, steps)], delta)
    assert exact <= spent <= max(exact * (1 + MOST_ABOVE), exact + MOST_ABOVE_TINY)


def test_settings_are_spread_over_the_stated_ranges() -> None:
    drawn = [setting(number)[0] for number in range(12)]
    assert {len(segments) for segments, _ in drawn} >= {1, 2}
    assert max(delta for _, delta in drawn) > 10 * min(delta for _, delta in drawn)
    steps = [segment.steps for segments, _ in drawn for segment in segments]
    assert max(steps) > 30 * min(steps)
