"""Intervals over seeds and over test rows, and differences that are paired in both.

A figure of an experiment varies with the seed (start, data order, noise) and with the test rows it was measured on. An
interval over seeds says how another run of the same data would come out; one over rows how the same run would do on
other rows of the same kind; :func:`paired_gain` covers both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
"""Of every interval here, two-sided."""

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        value: the mean.
        low: lower end; None where nothing can be said of the spread (one seed).
        high: upper end; None likewise.
        count: what the mean is over.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def verdict(self) -> int:
        """Sign of the mean where the interval excludes 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in other units."""
        ends = [None if end is None else factor * end for end in (self.low, self.high)]
        return Estimate(factor * self.value, ends[0], ends[1], self.count)


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean and Student's t-interval of one value a seed; no interval for one seed.

    With two seeds the interval is 12.7 standard errors wide on each side: seeds are few, and it says so.

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("no values; expected one a seed")
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    return _t_interval(mean, float(np.var(values, ddof=1)) / count, count - 1, count, confidence)


def paired_gain(tables: Sequence[Table], weights: Sequence[Table], *, shared_rows: bool, binary: bool) -> Estimate:
    """Return the mean of paired differences over rows and seeds, with an interval for both.

    The estimate is the mean over seeds of Σ difference / Σ weight. Its variance is taken as the sum of two parts: that
    of the mean over rows (of differences averaged over seeds, where the rows are the same ones) and, with several
    seeds, that of the mean over seeds. The chance that belongs to a row in a seed is in both, which makes the interval
    a little wide. Degrees of freedom are Satterthwaite's (1946). With one seed there is no second part, and the
    interval speaks of other test rows only.

    Differences of right and wrong answers get half a row of +1, half a row of -1 and one row of 0 for the variance over
    rows (Agresti and Min 2005, adjusted Wald interval for matched pairs), so that a few rows without any disagreement
    give an interval that is not a point.

    Args:
        tables: per seed, differences summed over what a row holds, [n_s].
        weights: per seed, what they are divided by, [n_s]: ones for rows, or tokens.
        shared_rows: whether all seeds have the same rows in the same order.
        binary: whether differences are of 0 and 1.

    Raises:
        ValueError: for no seeds or no rows.
    """
    if not tables or any(len(table) == 0 for table in tables):
        raise ValueError("no rows; expected some for every seed")
    seeds = len(tables)
    linear = [_linearised(table, weight) for table, weight in zip(tables, weights, strict=True)]
    per_seed = np.array([values.mean() for values in linear])
    averaged = [np.mean(linear, axis=0)] if shared_rows else linear
    by_rows = sum(_variance_of_mean(values, binary) for values in averaged) / len(averaged) ** 2
    rows_freedom = float(sum(len(values) - 1 for values in averaged) or 1)
    by_seeds = float(np.var(per_seed, ddof=1)) / seeds if seeds > 1 else 0.0
    freedom = rows_freedom
    if by_seeds > 0:
        freedom = (by_rows + by_seeds) ** 2 / (by_rows**2 / rows_freedom + by_seeds**2 / (seeds - 1))
    return _t_interval(float(per_seed.mean()), by_rows + by_seeds, freedom, len(tables[0]), CONFIDENCE)


def mcnemar(differences: Sequence[Table]) -> float:
    """Return the p-value of McNemar's exact test of right against wrong answers, over seeds.

    One test a seed on its disagreeing rows (binomial with 1/2); over seeds twice the median of the p-values, which is
    a p-value whatever their dependence (Rüger 1978).

    Args:
        differences: per seed, -1, 0 or 1 a row.
    """
    found = []
    for values in differences:
        better, worse = int((values > 0).sum()), int((values < 0).sum())
        found.append(float(stats.binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0)
    return found[0] if len(found) == 1 else min(1.0, 2.0 * float(np.median(found)))


def _linearised(differences: Table, weights: Table) -> Table:
    """Values whose mean is Σ differences / Σ weights and whose spread is that of the ratio (Taylor, first order)."""
    ratio = differences.sum() / weights.sum()
    values: Table = (differences - ratio * weights) / weights.mean() + ratio
    return values


def _variance_of_mean(values: Table, binary: bool) -> float:
    if not binary:
        return float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else math.inf
    count = len(values) + 2
    return float((np.square(values).sum() + 1) / count - (values.sum() / count) ** 2) / count


def _t_interval(mean: float, variance: float, freedom: float, count: int, confidence: float) -> Estimate:
    if not math.isfinite(variance):
        return Estimate(mean, None, None, count)
    if variance <= 0:
        return Estimate(mean, mean, mean, count)
    low, high = stats.t.interval(confidence, freedom, loc=mean, scale=math.sqrt(variance))
    return Estimate(mean, float(low), float(high), count)
