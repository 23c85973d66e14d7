"""The end of a budget, to the step, and what a run for persons spends of one record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import fftconvolve
from scipy.stats import norm

from client.ledger.events import Charge
from client.ledger.spending import _last_within, epsilon_of, fits, segment_for, steps_left
from client.site_config import Budget
from common.errors import PrivacyError
from common.privacy.accounting import Segment, epsilon_spent
from tests.client.ledgers import charge


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spent", "kind", "cap"),
    [
        ([], charge(30), 6.0),
        ([charge(60)], charge(30), 6.0),
        ([charge(40), charge(20, noise=1.5, rate=0.05)], charge(10, noise=0.9, rate=0.02), 5.0),
        ([charge(10, unit="user")], charge(10, noise=2.0, unit="user"), 5.0),
        ([charge(60)], charge(30), 5.0),
        ([], charge(30, noise=0.4, rate=1.0), 1.0),
    ],
)
def test_steps_left_is_the_last_step_within_the_budget(spent: list[Charge], kind: Charge, cap: float) -> None:
    budget = Budget(epsilon=cap)
    left = steps_left(spent, kind, budget)
    assert left == 0 or fits(spent, kind.model_copy(update={"steps": left}), budget)
    assert not fits(spent, kind.model_copy(update={"steps": left + 1}), budget)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0.4, 1.0), st.floats(0.0, 50.0))
def test_search_finds_the_last_step_on_any_course(guess: int, end: int, power: float, before: float) -> None:
    def course(steps: int) -> float:
        return float(before + steps**power)

    found = _last_within(course, course(end), guess)
    assert course(found) <= course(end) < course(found + 1)


def test_search_finds_nothing_where_nothing_is_left() -> None:
    assert _last_within(lambda steps: 5.0 + steps, 4.0, 3) == 0


def test_equal_charges_count_as_their_sum() -> None:
    budget = Budget(epsilon=8)
    assert epsilon_of([charge(7)] * 4, budget) == epsilon_of([charge(28)], budget)
    assert epsilon_of([], budget) == 0.0


@pytest.mark.parametrize(
    ("unit", "budget_unit", "noise"),
    [("example", "example", 1.2), ("user", "user", 1.2), ("user", "example", 0.6)],
)
def test_charge_counts_by_the_unit_of_the_budget(unit: str, budget_unit: str, noise: float) -> None:
    budget = Budget.model_validate({"epsilon": 1.0, "unit": budget_unit})
    assert segment_for(charge(9, 1.2, 0.1, unit), budget) == Segment(noise, 0.1, 9)


def test_run_for_single_records_is_refused_by_a_budget_for_persons() -> None:
    with pytest.raises(PrivacyError, match="a person may have many"):
        segment_for(charge(), Budget(epsilon=1.0, unit="user"))


def exchanged_record_delta(sigma: float, rate: float, steps: int, epsilon: float) -> float:
    """δ at ``epsilon`` where one record turns a person's contribution from C into -C, by numerical integration.

    The pair is (1 - q) N(0, σ²) + q N(C, σ²) against (1 - q) N(0, σ²) + q N(-C, σ²) with C = 1. The privacy loss is
    put on a grid, rounded up, and convolved with itself; slow and obvious.
    """
    spread = np.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 400_001)
    width = spread[1] - spread[0]

    def density(centre: float) -> np.ndarray:
        return (1 - rate) * norm.pdf(spread, 0, sigma) + rate * norm.pdf(spread, centre, sigma)

    here, there = density(1.0), density(-1.0)
    loss = np.log(here) - np.log(there)
    grid = 2e-3 / steps**0.5
    bins = np.ceil(loss / grid).astype(int)
    low = int(bins.min())
    mass = np.bincount(bins - low, weights=here * width)
    mass /= mass.sum()
    total, offset = np.ones(1), 0
    for _ in range(steps):
        total, offset = fftconvolve(total, mass), offset + low
        keep = np.flatnonzero(total > 1e-16)
        total, offset = total[keep[0] : keep[-1] + 1], offset + int(keep[0])
    losses = (offset + np.arange(len(total))) * grid
    return float(np.sum(np.clip(total, 0, None) * np.clip(1 - np.exp(epsilon - losses), 0, None)))


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.0, 0.1, 1), (1.0, 0.1, 30), (2.0, 0.2, 40), (4.0, 1.0, 10), (1.5, 0.02, 60), (4.0, 0.5, 30)],
)
def test_one_record_of_a_person_spends_no_more_than_half_the_noise_says(sigma: float, rate: float, steps: int) -> None:
    """Checked, not proved: at the ε that is charged, δ of exchanging C for -C stays below the budget's 1e-5."""
    charged = epsilon_spent([Segment(sigma / 2, rate, steps)], 1e-5)
    assert exchanged_record_delta(sigma, rate, steps, charged) <= 1e-5
