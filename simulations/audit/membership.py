"""The loss-threshold membership attack: what is fitted better was probably trained on (Yeom et al. 1709.01604)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve

from common.errors import DataError
from common.randomness import numpy_generator

Scores = NDArray[np.float64]

FALSE_POSITIVES = 0.01
RESAMPLES = 1000


@dataclass(frozen=True)
class Membership:
    """How well scores tell members from others.

    Attributes:
        members: number of rows that were trained on.
        others: number of rows that were not.
        auc: area under the ROC curve; 0.5 is chance.
        auc_low: lower end of its 95 % bootstrap interval.
        auc_high: upper end.
        tpr_at_1_percent_fpr: share of members found where at most 1 % of the others are taken for members.
    """

    members: int
    others: int
    auc: float
    auc_low: float
    auc_high: float
    tpr_at_1_percent_fpr: float


def roc(members: Scores, others: Scores) -> tuple[Scores, Scores]:
    """Return false and true positive rates over all thresholds, higher scores taken for members.

    Raises:
        DataError: without members or without others.
    """
    if not len(members) or not len(others):
        raise DataError(f"{len(members)} members and {len(others)} others; expected at least one of each.")
    truth = np.repeat([1, 0], [len(members), len(others)])
    false_rate, true_rate, _ = roc_curve(truth, np.concatenate([members, others]), drop_intermediate=False)
    return false_rate, true_rate


def measure_membership(members: Scores, others: Scores, seed: int, resamples: int = RESAMPLES) -> Membership:
    """Measure a membership attack; members and others are resampled apart for the interval.

    Args:
        members: scores of rows that were trained on; higher is surer.
        others: scores of rows that were not.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: without members or without others.
    """
    false_rate, true_rate = roc(members, others)
    draw = numpy_generator(seed, "audit-bootstrap")
    areas = [_area(draw.choice(members, len(members)), draw.choice(others, len(others))) for _ in range(resamples)]
    low, high = np.quantile(areas, [0.025, 0.975])
    return Membership(
        members=len(members),
        others=len(others),
        auc=float(auc(false_rate, true_rate)),
        auc_low=float(low),
        auc_high=float(high),
        tpr_at_1_percent_fpr=float(true_rate[false_rate <= FALSE_POSITIVES].max()),
    )


def _area(members: Scores, others: Scores) -> float:
    """The area under the ROC curve as the share of pairs that are in order, ties for half (Mann and Whitney)."""
    ranked = np.sort(others)
    below = np.searchsorted(ranked, members, "left") + np.searchsorted(ranked, members, "right")
    return float(below.mean() / (2 * len(others)))
