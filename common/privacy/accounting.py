"""From what was done to (ε, δ), and from a wanted (ε, δ) to the noise.

A *segment* is (noise multiplier σ, sample rate q, number of steps) of the Poisson-sampled Gaussian mechanism. Segments
compose over rounds and runs; equal ones are merged, since the PRV accountant's time grows with distinct segments.
Neighbouring data sets differ by adding or removing one record.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from common.errors import PrivacyError

TOLERANCE = 0.01
"""Calibrated noise spends between ``epsilon - TOLERANCE`` (or 1 % of it, if that is less) and ``epsilon``."""

_COARSE, _FINE, _SHARE = 0.01, 0.001, 0.005
"""PRV adds its discretisation error to ε: the coarse one where it is small beside ε, else a share of ε, which costs
little because ε is small then, but never less than the fine one."""

_LARGEST_NOISE = 1e4
_HOPELESS_EPSILON = 50.0
_MOST_STEPS, _MOST_FINE_STEPS = 2_000_000, 100_000
"""Where RDP gives such an ε, or for so many steps, its bound is used in PRV's place, which may take minutes and
gigabytes there: to say about the same of a large ε, or by what a hostile site or run plans. From the second number on
PRV adds :data:`_COARSE` to an ε however small, which takes a tenth of the time."""


@dataclass(frozen=True, order=True)
class Segment:
    """Steps taken with one noise multiplier and one sample rate."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def merge(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Merge segments of equal σ and q; drop those without steps. Order does not matter."""
    steps: dict[tuple[float, float], int] = {}
    for segment in segments:
        key = (float(segment.noise_multiplier), float(segment.sample_rate))
        steps[key] = steps.get(key, 0) + int(segment.steps)
    return tuple(Segment(*key, steps=count) for key, count in sorted(steps.items()) if count > 0)


def epsilon_spent(segments: Iterable[Segment], delta: float, accountant: str = "prv") -> float:
    """Return ε of the composition at ``delta``; an upper bound. 0 for no steps.

    PRV's bound is RDP's where PRV has none, and beyond 2,000,000 steps or an ε of 50.

    Args:
        segments: what was done, in any order.
        delta: δ in (0, 1).
        accountant: "prv" (Gopi et al. 2106.02848) or "rdp" (Mironov et al. 1908.10530).

    Raises:
        PrivacyError: if a segment has no noise or the accountant cannot bound it.
    """
    return _epsilon(merge(segments), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(segments: tuple[Segment, ...], delta: float, accountant: str) -> float:
    if not segments:
        return 0.0
    if any(segment.noise_multiplier <= 0 or not 0 < segment.sample_rate <= 1 for segment in segments):
        raise PrivacyError("a step without noise or with a sample rate outside (0, 1] has no finite ε; expected both.")
    if accountant == "prv":
        loose = _rdp_epsilon(segments, delta)
        if loose > _HOPELESS_EPSILON or (loose > 0 and sum(one.steps for one in segments) > _MOST_STEPS):
            return loose
    engine = _create_accountant()(mechanism=accountant)
    engine.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in segments]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prv_epsilon(engine, delta) if accountant == "prv" else float(engine.get_epsilon(delta=delta))
    except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
        if accountant == "prv":
            return _epsilon(segments, delta, "rdp")
        raise PrivacyError(
            f"ε at δ={delta:g} cannot be bounded for these steps ({type(error).__name__}); expected less noise "
            "or more. Change privacy.epsilon or privacy.delta."
        ) from None


def _rdp_epsilon(segments: tuple[Segment, ...], delta: float) -> float:
    """Return RDP's bound; 0 where RDP has none, so that PRV is asked."""
    try:
        return _epsilon(segments, delta, "rdp")
    except PrivacyError:
        return 0.0


@cache
def _create_accountant() -> Any:
    """Return what makes Opacus' accountants, which is a quarter of a process's start: runs without DP need not pay it.

    PRV spends nine tenths of its time on RDP's bounds, which for one step follow from (q, σ, order): they are kept,
    so that a site's next round costs a tenth of its first.
    """
    from opacus.accountants import create_accountant
    from opacus.accountants.analysis import rdp

    rdp._compute_rdp = lru_cache(maxsize=2**17)(rdp._compute_rdp)
    return create_accountant


def _prv_epsilon(engine: Any, delta: float) -> float:
    """Return PRV's upper bound, at most about 1 % or :data:`_FINE` above ε; of very many steps :data:`_COARSE`."""
    coarse = float(engine.get_epsilon(delta=delta, eps_error=_COARSE))
    if 1.5 * _SHARE * coarse >= _COARSE or sum(steps for _, _, steps in engine.history) > _MOST_FINE_STEPS:
        return coarse
    try:
        return float(engine.get_epsilon(delta=delta, eps_error=max(_FINE, _SHARE * (coarse - _COARSE))))
    except (ValueError, RuntimeError, MemoryError):
        return coarse


@lru_cache(maxsize=1024)
def calibrate_noise(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv") -> float:
    """Return the least noise multiplier, within :data:`TOLERANCE`, that spends at most ``epsilon``.

    The RDP bound is searched first, because it is cheap; the PRV search then starts from its answer, which is always
    enough noise. Below ε of about 0.1 RDP has no answer, and the PRV search starts on its own.

    Raises:
        PrivacyError: if no sensible amount of noise reaches ``epsilon``.
    """
    request = (epsilon, delta, sample_rate, steps)
    enough = _first_enough(*request, "rdp")
    if enough is not None:
        enough = _bisect(*request, "rdp", 0.0, enough)
        if accountant == "rdp":
            return enough
        return _bisect(*request, accountant, 0.25 * enough, enough)
    enough = _first_enough(*request, accountant)
    if enough is None:
        raise PrivacyError(
            f"privacy.epsilon {epsilon:g} at δ={delta:g} over {steps} steps needs a noise multiplier above "
            f"{_LARGEST_NOISE:g} ({accountant}); expected a larger ε, fewer steps or the prv accountant."
        )
    return _bisect(*request, accountant, 0.0, enough)


def _first_enough(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float | None:
    noise = 0.5
    while noise <= _LARGEST_NOISE:
        if _epsilon((Segment(noise, sample_rate, steps),), delta, accountant) <= epsilon:
            return noise
        noise *= 2
    return None


def _bisect(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    low: float,
    high: float,
) -> float:
    """Narrow [low, high], where ``high`` is enough noise, and return the upper end."""
    tolerance = min(TOLERANCE, 0.01 * epsilon)
    spent = _epsilon((Segment(high, sample_rate, steps),), delta, accountant)
    while epsilon - spent > tolerance and high - low > 1e-6 * high:
        guess = high * spent / epsilon if spent > 0.5 * epsilon else 0.0
        middle = guess if low < guess < high and high - guess > 1e-3 * high else (low + high) / 2
        reached = _epsilon((Segment(middle, sample_rate, steps),), delta, accountant)
        if reached <= epsilon:
            high, spent = middle, reached
        else:
            low = middle
    return high
