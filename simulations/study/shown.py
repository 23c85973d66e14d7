"""How figures are written for people: per cent where they are shares, an interval where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulations.study.intervals import Estimate

NOTHING = "-"


def estimate_of(values: Mapping[str, Any]) -> Estimate:
    """Return the estimate that a JSON file holds."""
    return Estimate(values["value"], values["low"], values["high"], values["count"])


def metric(headline: str, value: float | None) -> str:
    """Return a metric: accuracy in per cent, others as they are."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if headline == "accuracy" else f"{value:.2f}"


def mean_and_half(estimate: Estimate | None, digits: int = 1) -> str:
    """Return ``mean ± half-width``; the mean alone where there is no interval."""
    if estimate is None:
        return NOTHING
    half = estimate.half
    return f"{estimate.value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def signed_interval(estimate: Estimate | None, digits: int = 1) -> str:
    """Return ``+mean [low, high]``; the mean alone where there is no interval."""
    if estimate is None:
        return NOTHING
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.{digits}f}"
    return f"{estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def shown_metric(headline: str) -> tuple[str, float]:
    """Return how a metric is labelled and what it is multiplied by: shares are shown in per cent."""
    return ("accuracy (%)", 100.0) if headline == "accuracy" else (headline.replace("_", " "), 1.0)
