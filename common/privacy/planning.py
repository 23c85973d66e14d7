"""The mechanism of a run at one site: what is clipped, how much noise, how often."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.config.run import RunConfig
from common.errors import PrivacyError
from common.privacy.accounting import Segment, calibrate_noise, epsilon_spent


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD with Poisson sampling at one site (Abadi et al. 1607.00133, algorithm 1).

    Attributes:
        noise_multiplier: σ; the noise on the summed, clipped gradients has standard deviation σ C.
        clip_norm: C, the L2 norm each example's gradient is clipped to.
        sample_rate: q, the probability of each record to be in a step.
        expected_batch_size: q N, what the noisy sum is divided by.
        steps_per_round: steps in one round.
        delta: δ of the claim.
        accountant: "prv" or "rdp".
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch_size: float
    steps_per_round: int
    delta: float
    accountant: str

    def epsilon_after(self, rounds: int) -> float:
        """Return ε after taking part in ``rounds`` rounds."""
        return epsilon_spent([self.segment(rounds)], self.delta, self.accountant)

    def segment(self, rounds: int = 1) -> Segment:
        """Return what ``rounds`` rounds add to the site's history."""
        return Segment(self.noise_multiplier, self.sample_rate, rounds * self.steps_per_round)


def plan_mechanism(config: RunConfig, num_examples: int) -> Mechanism | None:
    """Plan the mechanism of one site for the whole run, or None where ``privacy.unit`` is "none".

    The plan assumes that the site takes part in every round, so that the budget holds however sites are sampled.

    Args:
        config: the run config.
        num_examples: rows at the site; taken as public (see the claim).

    Raises:
        PrivacyError: if the budget cannot be met.
    """
    privacy = config.privacy
    if privacy.unit == "none":
        return None
    rate = privacy.sample_rate
    if rate is None:
        rate = min(1.0, config.training.batch_size / num_examples)
    steps = steps_per_round(config, 1.0 / rate)
    if privacy.delta >= 1.0 / num_examples:
        raise PrivacyError(
            f"privacy.delta {privacy.delta:g} is not below one over the {num_examples} rows of a site; "
            f"expected at most {0.1 / num_examples:.1g}. Lower privacy.delta."
        )
    target = privacy.target_epsilon
    if target is None:
        noise = float(privacy.noise_multiplier or 0.0)
    else:
        total = steps * config.federation.rounds
        noise = calibrate_noise(target, privacy.delta, rate, total, privacy.accountant)
    return Mechanism(
        noise,
        privacy.clip_norm,
        rate,
        rate * num_examples,
        steps,
        privacy.delta,
        privacy.accountant,
    )


def plain_steps(config: RunConfig, num_examples: int) -> int:
    """Return the number of steps in a round without differential privacy: whole batches, the last one smaller."""
    return steps_per_round(config, math.ceil(num_examples / config.training.batch_size))


def steps_per_round(config: RunConfig, steps_per_epoch: float) -> int:
    """Return the number of steps in a round, from ``training.local_steps`` or ``local_epochs``."""
    training = config.training
    if training.local_steps is not None:
        return training.local_steps
    return max(1, math.ceil(round((training.local_epochs or 1.0) * steps_per_epoch, 9)))
