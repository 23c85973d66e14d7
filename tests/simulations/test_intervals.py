"""Intervals over seeds and rows: against formulas written out, a bootstrap, and their own coverage."""

from __future__ import annotations

import math
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from simulations.study.intervals import Table, mcnemar, over_seeds, paired_gain


def ones(tables: list[Table]) -> list[Table]:
    return [np.ones(len(table)) for table in tables]


def of_rows(tables: list[Table], *, shared: bool = True, binary: bool = True) -> tuple[float, float, float]:
    found = paired_gain(tables, ones(tables), shared_rows=shared, binary=binary)
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


def signs(generator: np.random.Generator, rows: int, better: float = 0.3, worse: float = 0.15) -> Table:
    return generator.choice([1.0, -1.0, 0.0], rows, p=[better, worse, 1 - better - worse])


def test_over_seeds_is_students_interval() -> None:
    values = [0.61, 0.66, 0.58, 0.71]
    found = over_seeds(values)
    half = 3.182446 * stdev(values) / 2.0
    assert found.value == pytest.approx(mean(values))
    assert (found.low, found.high) == pytest.approx((mean(values) - half, mean(values) + half), rel=1e-6)
    assert over_seeds([0.5]).half is None
    assert over_seeds([0.5]).verdict == 0
    with pytest.raises(ValueError, match="no values"):
        over_seeds([])


def test_gain_of_one_seed_is_agresti_and_mins_adjusted_wald() -> None:
    table = np.array([1.0] * 12 + [-1.0] * 5 + [0.0] * 23)
    value, low, high = of_rows([table])
    b, c, n = 12.5, 5.5, 42.0
    error = math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert value == pytest.approx(7 / 40)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 39) * error, rel=0.03)


def test_rows_without_any_disagreement_still_give_an_interval() -> None:
    value, low, high = of_rows([np.zeros(20)])
    assert value == 0.0
    assert low < -0.05 < 0.05 < high
    assert of_rows([np.zeros(200)])[2] < high


def test_gain_of_several_seeds_agrees_with_a_bootstrap_of_rows_and_seeds() -> None:
    generator = np.random.default_rng(3)
    propensity = generator.normal(0.2, 0.5, 400)
    tables = [propensity + generator.normal(shift, 0.4, 400) for shift in generator.normal(0.0, 0.08, 12)]
    value, low, high = of_rows(tables, binary=False)
    matrix = np.array(tables)
    again = []
    for _ in range(4000):
        seeds, rows = generator.integers(0, 12, 12), generator.integers(0, 400, 400)
        again.append(matrix[seeds][:, rows].mean())
    slow_low, slow_high = np.quantile(again, [0.025, 0.975])
    assert value == pytest.approx(matrix.mean())
    assert high - low == pytest.approx(slow_high - slow_low, rel=0.2)


@pytest.mark.parametrize(("seeds", "shared"), [(1, True), (4, True), (4, False)])
def test_interval_covers_the_truth_as_often_as_it_says(seeds: int, shared: bool) -> None:
    """2,000 draws; 95 % less four standard errors (0.5 % each) is 93 %. It may cover more."""
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(2000):
        row = generator.normal(0.0, 1.0, (1 if shared else seeds, 40))
        values = (
            0.1 + row + generator.normal(0.0, 0.3, (seeds, 1)) * (seeds > 1) + generator.normal(0, 0.7, (seeds, 40))
        )
        _, low, high = of_rows(list(values), shared=shared, binary=False)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / 2000 <= 0.995


def test_ratio_of_sums_is_weighed_by_tokens() -> None:
    differences, tokens = np.array([3.0, 8.0, 1.0]), np.array([10.0, 40.0, 5.0])
    found = paired_gain([differences], [tokens], shared_rows=True, binary=False)
    assert found.value == pytest.approx(12.0 / 55.0)
    residuals = differences - 12.0 / 55.0 * tokens
    error = math.sqrt(np.var(residuals, ddof=1) / 3) / tokens.mean()
    assert found.half == pytest.approx(stats.t.ppf(0.975, 2) * error)


def test_one_row_has_no_interval_and_no_rows_are_refused() -> None:
    found = paired_gain([np.array([0.4])], [np.ones(1)], shared_rows=True, binary=False)
    assert (found.value, found.low, found.verdict) == (pytest.approx(0.4), None, 0)
    with pytest.raises(ValueError, match="no rows"):
        paired_gain([np.zeros(0)], [np.zeros(0)], shared_rows=True, binary=True)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=3, max_size=40))
def test_gain_turns_with_the_sides_and_not_with_the_order_of_rows(values: list[float]) -> None:
    table: NDArray[np.float64] = np.array(values)
    value, low, high = of_rows([table])
    assert of_rows([-table]) == pytest.approx((-value, -high, -low), abs=1e-12)
    assert of_rows([table[::-1]]) == pytest.approx((value, low, high), abs=1e-12)


def test_mcnemar_is_the_binomial_sum_and_twice_the_median_over_seeds() -> None:
    table = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    by_hand = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert mcnemar([table]) == pytest.approx(by_hand)
    assert mcnemar([np.zeros(7)]) == 1.0
    assert mcnemar([table, table, np.zeros(41)]) == pytest.approx(2 * by_hand)


def test_mcnemar_over_seeds_rarely_rejects_a_true_null() -> None:
    """1,000 nulls whose seeds share most of their disagreements; 5 % plus four standard errors is 7.8 %."""
    generator = np.random.default_rng(5)
    rejected = 0
    for _ in range(1000):
        common = signs(generator, 60, 0.2, 0.2)
        tables = [np.where(generator.random(60) < 0.8, common, signs(generator, 60, 0.2, 0.2)) for _ in range(3)]
        rejected += mcnemar(tables) < 0.05
    assert rejected / 1000 <= 0.078
