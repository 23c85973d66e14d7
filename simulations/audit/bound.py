"""From guesses about canaries to a lower bound on ε (Steinke, Nasr and Jagielski 2023, 2305.08846).

m canaries are each in the training data with probability 1/2, independently. An auditor who sees what the mechanism
released guesses "in" or "out" for r of them and abstains from the others. If the mechanism is (ε, δ)-DP for adding or
removing a canary, the number W of correct guesses is nearly dominated by a binomial: with
f(v) = P[Binomial(r, e^ε / (e^ε + 1)) ≥ v], theorem 5.2 and corollary 5.4 say

    P[W ≥ v] ≤ f(v) + 2 m δ max_{1 ≤ i ≤ m} (f(v - i) - f(v)) / i.

So the largest ε at which the right side is below 5 % is, with 95 % confidence, at most the true ε. How many guesses are
made is fixed before any score is seen (:class:`GuessPlan`). Even if all r are right the bound has a ceiling, about 3.5
for r = 100 and 5.8 for r = 1,000: a claim above it is never refuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from common.errors import ConfigError

CONFIDENCE = 0.95
"""One bound in twenty may exceed the true ε by chance, at most."""

_PRECISION = 1e-4


@dataclass(frozen=True)
class GuessPlan:
    """How many guesses are made, fixed before there are scores.

    Attributes:
        guesses_in: k+, how many of the highest scores are guessed to be in.
        guesses_out: k-, how many of the lowest scores are guessed to be out.
    """

    guesses_in: int
    guesses_out: int

    @property
    def guesses(self) -> int:
        """R, the number of guesses."""
        return self.guesses_in + self.guesses_out

    def correct(self, scores: Sequence[float] | NDArray[np.float64], included: Sequence[bool]) -> int:
        """Make the guesses and return how many are correct; equal scores are ordered by index, which tells nothing.

        Args:
            scores: [m], higher for canaries that seem to be in.
            included: [m], whether each was in.

        Raises:
            ConfigError: for fewer canaries than guesses.
        """
        if self.guesses > len(scores):
            raise ConfigError(f"{self.guesses} guesses about {len(scores)} canaries; expected at most one for each.")
        order = np.argsort(np.asarray(scores), kind="stable")
        truth = np.asarray(included, dtype=bool)
        top = order[len(order) - self.guesses_in :]
        return int(truth[top].sum() + (~truth[order[: self.guesses_out]]).sum())


def plan_guesses(guesses: int, canaries: int) -> GuessPlan:
    """Plan ``guesses``, half of them "in" and half "out".

    Raises:
        ConfigError: for more guesses than canaries, or fewer than two.
    """
    if not 2 <= guesses <= canaries:
        raise ConfigError(
            f"--guesses {guesses} about {canaries} canaries; expected from 2 to as many as there are canaries."
        )
    return GuessPlan(guesses - guesses // 2, guesses // 2)


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the bound on the chance of so many correct guesses under (ε, δ)-DP.

    Args:
        correct: v, correct guesses.
        guesses: r, guesses made.
        canaries: m, canaries of whom each could have been guessed about.
        epsilon: ε of the hypothesis.
        delta: δ of the hypothesis.

    References:
        2305.08846, theorem 5.2 and corollary 5.4.
    """
    if correct == 0:
        return 1.0
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = binom.sf(np.arange(-1, correct), guesses, rate)  # f(0), f(1), ..., f(v)
    reached = float(tail[correct])
    # Beyond i = v the difference no longer grows while it is divided by more, so i up to v is enough.
    share = (tail[correct - 1 :: -1] - reached) / np.arange(1, correct + 1)
    return min(1.0, reached + 2.0 * canaries * delta * float(share.max()))


def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return the largest ε that so many correct guesses refute at ``confidence``; 0 if they refute none.

    Raises:
        ConfigError: for counts that are not 0 ≤ correct ≤ guesses ≤ canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(
            f"{correct} correct of {guesses} guesses about {canaries} canaries; expected no more correct than guesses "
            "and no more guesses than canaries."
        )
    allowed = 1.0 - confidence
    if p_value(correct, guesses, canaries, 0.0, delta) >= allowed:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(correct, guesses, canaries, high, delta) < allowed:
        low, high = high, 2.0 * high
    while high - low > _PRECISION:
        middle = 0.5 * (low + high)
        if p_value(correct, guesses, canaries, middle, delta) < allowed:
            low = middle
        else:
            high = middle
    return low
