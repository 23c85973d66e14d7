"""Mechanisms for tests, with the keys that a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from common.privacy.planning import Mechanism


def mechanism_of(
    clip: float = 1.0, noise: float = 1e-12, expected: float = 1.0, steps: int = 1, rate: float = 1.0, **others: Any
) -> Mechanism:
    """A mechanism with hardly any noise."""
    return Mechanism(
        noise_multiplier=noise, clip_norm=clip, sample_rate=rate, expected_batch_size=expected, steps_per_round=steps,
        delta=1e-5, accountant="rdp", **others,
    )  # fmt: skip
