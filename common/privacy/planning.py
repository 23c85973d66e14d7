"""The mechanism of a run: what is clipped, how much noise, how often; at a site, or at the coordinator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.config.run import RunConfig
from common.errors import PrivacyError
from common.privacy.accounting import Segment, calibrate_noise, epsilon_spent


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The Poisson-sampled Gaussian mechanism (DP-SGD: Abadi et al. 1607.00133, algorithm 1).

    A step may answer side questions about the same sample: how many gradients are below the clip norm, how large the
    loss is. Gaussian answers with noise multipliers z_i to one sample cost as much as one with z, 1/z² = Σ 1/z_i²
    (Andrew et al. 1905.03871, theorem 1), so each takes a share of 1/z².

    Attributes:
        noise_multiplier: z; of the whole step, as accounted.
        clip_norm: C, the L2 norm that each unit's contribution is clipped to.
        sample_rate: q, the probability of each unit to be in a step.
        expected_batch_size: q N, what the noisy sum is divided by.
        steps_per_round: steps in one round.
        delta: δ of the claim.
        accountant: "prv" or "rdp".
        unit: whose contribution is clipped: "example", "user" or "site".
        clipping: "flat", "per_layer" or "adaptive".
        quantile_share: share of 1/z² for the count behind adaptive clipping.
        loss_share: share of 1/z² for the released loss; 0 where the loss is withheld.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch_size: float
    steps_per_round: int
    delta: float
    accountant: str
    unit: Literal["example", "user", "site"] = "example"
    clipping: Literal["flat", "per_layer", "adaptive"] = "flat"
    quantile_share: float = 0.0
    loss_share: float = 0.0

    @property
    def gradient_noise(self) -> float:
        """Noise multiplier of the gradient: its noise has standard deviation ``gradient_noise`` x C."""
        return self.noise_multiplier / math.sqrt(1.0 - self.quantile_share - self.loss_share)

    @property
    def quantile_noise(self) -> float:
        """Noise multiplier of the count below the clip norm, in units of its sensitivity 1/2."""
        return self.noise_multiplier / math.sqrt(self.quantile_share)

    @property
    def loss_noise(self) -> float:
        """Noise multiplier of the summed loss, in units of the bound of one loss."""
        return self.noise_multiplier / math.sqrt(self.loss_share)

    def epsilon_after(self, rounds: int) -> float:
        """Return ε after taking part in ``rounds`` rounds."""
        return epsilon_spent([self.segment(rounds)], self.delta, self.accountant)

    def segment(self, rounds: int = 1) -> Segment:
        """Return what ``rounds`` rounds add to the history of whoever is protected."""
        return Segment(self.noise_multiplier, self.sample_rate, rounds * self.steps_per_round)


def plan_mechanism(config: RunConfig, num_units: int) -> Mechanism | None:
    """Plan the mechanism of one site for the whole run, or None where sites add no noise themselves.

    The plan assumes that the site takes part in every round, so that the budget holds however sites are sampled.

    Args:
        config: the run config.
        num_units: rows at the site for unit "example", persons for unit "user"; taken as public (see the claim).

    Raises:
        PrivacyError: if the budget cannot be met.
    """
    privacy = config.privacy
    if not privacy.is_local:
        return None
    what = "rows" if privacy.unit == "example" else "persons"
    rate = default_sample_rate(config, num_units) if privacy.sample_rate is None else privacy.sample_rate
    _expect_small_delta("privacy.delta", privacy.delta, num_units, f"{what} of a site")
    steps = steps_per_round(config, 1.0 / rate)
    total = steps * config.federation.rounds
    target = privacy.target_epsilon
    return Mechanism(
        noise_multiplier=_noise(target, privacy.noise_multiplier, privacy.delta, rate, total, privacy.accountant),
        clip_norm=privacy.clip_norm,
        sample_rate=rate,
        expected_batch_size=rate * num_units,
        steps_per_round=steps,
        delta=privacy.delta,
        accountant=privacy.accountant,
        unit="user" if privacy.unit == "user" else "example",
        clipping=privacy.clipping,
        quantile_share=privacy.used_quantile_share,
        loss_share=privacy.used_loss_share,
    )


def default_sample_rate(config: RunConfig, num_units: int) -> float:
    """Return q where the run config gives none: a batch over the units, or less, so that passes are whole.

    A round of E passes over N units takes ⌈E N / B⌉ steps. With q = E over that number a unit is seen E times a round,
    on average, as without DP; q = B / N would see the last, incomplete batch in full.

    Args:
        config: the run config.
        num_units: N, rows or persons at the site.
    """
    rate = min(1.0, config.training.batch_size / num_units)
    if config.training.local_steps is not None:
        return rate
    return min(1.0, (config.training.local_epochs or 1.0) / steps_per_round(config, 1.0 / rate))


def plan_site_level(config: RunConfig, num_sites: int) -> Mechanism | None:
    """Plan what the coordinator does to protect whole sites, or None where it does nothing.

    One step a round: each site is in it with probability q = sites_per_round / N, or always (McMahan et al.
    1710.06963, with noise on the sum and division by q N).

    Args:
        config: the run config.
        num_sites: sites of the federation; taken as public.

    Raises:
        PrivacyError: if the budget cannot be met.
    """
    settings = config.privacy.site_level_settings
    if settings is None:
        return None
    _expect_small_delta("the site-level delta", settings.delta, num_sites, "sites of the federation")
    rate = min(1.0, (config.federation.sites_per_round or num_sites) / num_sites)
    rounds = config.federation.rounds
    return Mechanism(
        noise_multiplier=_noise(
            settings.target_epsilon, settings.noise_multiplier, settings.delta, rate, rounds, settings.accountant
        ),
        clip_norm=settings.clip_norm,
        sample_rate=rate,
        expected_batch_size=rate * num_sites,
        steps_per_round=1,
        delta=settings.delta,
        accountant=settings.accountant,
        unit="site",
    )


def plain_steps(config: RunConfig, num_examples: int) -> int:
    """Return the number of steps in a round without local noise: whole batches, the last one smaller."""
    return steps_per_round(config, math.ceil(num_examples / config.training.batch_size))


def steps_per_round(config: RunConfig, steps_per_epoch: float) -> int:
    """Return the number of steps in a round, from ``training.local_steps`` or ``local_epochs``."""
    training = config.training
    if training.local_steps is not None:
        return training.local_steps
    return max(1, math.ceil(round((training.local_epochs or 1.0) * steps_per_epoch, 9)))


def _noise(target: float | None, given: float | None, delta: float, rate: float, steps: int, accountant: str) -> float:
    if target is None:
        return float(given or 0.0)
    return calibrate_noise(target, delta, rate, steps, accountant)


def _expect_small_delta(key: str, delta: float, units: int, what: str) -> None:
    if delta >= 1.0 / units:
        raise PrivacyError(
            f"{key} {delta:g} is not below one over the {units} {what}; expected at most {0.1 / units:.1g}. Lower it."
        )
