"""Site-level differential privacy at the coordinator: updates clipped on arrival, noise on their sum.

DP-FedAvg (McMahan et al. 1710.06963): each site is in a round with probability q, its update is clipped to S, the sum
gets noise of standard deviation z S and is divided by the expected q N, whoever answered. So one site more or less
moves the sum by at most S, and the adapters of all rounds together are (ε, δ)-private in it. It trusts the coordinator
with the clear updates, and the coordinator not to publish who took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.config.run import RunConfig
from common.privacy.planning import Mechanism, plan_site_level
from common.randomness import KeyedRandomness, PrivateRandomness, SystemRandomness
from common.tensors import Tensors, l2_norm

COORDINATOR = "\0coordinator"
"""Key of the coordinator's streams in a seeded simulation; no site can have this name."""


@dataclass(frozen=True)
class SiteLevel:
    """Protects whole sites in a run.

    Attributes:
        mechanism: of unit "site".
        randomness: of the noise and of the choice of sites.
    """

    mechanism: Mechanism
    randomness: PrivateRandomness

    def cohort(self, names: Sequence[str], round_number: int) -> list[str]:
        """Return the sites of a round, sorted: each with the probability that is accounted for; perhaps none."""
        draws = self.randomness.stream("cohort", round_number).uniform(len(names))
        chosen = (draws < self.mechanism.sample_rate).tolist()
        return [name for name, taken in zip(sorted(names), chosen, strict=True) if taken]

    def clip(self, update: Tensors) -> Tensors:
        """Return the update, scaled down to the clip norm where it is longer."""
        norm = l2_norm(update)
        if norm <= self.mechanism.clip_norm:
            return update
        factor = self.mechanism.clip_norm / norm
        return {name: (value.double() * factor).float() for name, value in update.items()}

    def noised(self, mean: Mapping[str, Tensor], count: int, number: int) -> Tensors:
        """Return the aggregated update: the sum of the clipped updates plus noise, over the expected number of sites.

        Args:
            mean: the plain mean of ``count`` clipped updates; zeros where there were none.
            count: updates in the mean.
            number: of the round.
        """
        stream = self.randomness.stream("site-noise", number)
        expected = self.mechanism.expected_batch_size
        deviation = self.mechanism.noise_multiplier * self.mechanism.clip_norm / expected
        return {
            name: (mean[name].double() * (count / expected) + deviation * stream.normal(mean[name].shape)).float()
            for name in sorted(mean)
        }


def site_level_of(config: RunConfig, num_sites: int, *, seeded: bool) -> SiteLevel | None:
    """Return what protects whole sites in a run, or None where its config does not ask for it.

    Args:
        config: the run config.
        num_sites: sites of the federation.
        seeded: whether noise may follow from the run's seed: in a simulation, where every site's does too.

    Raises:
        PrivacyError: if the budget cannot be met.
    """
    mechanism = plan_site_level(config, num_sites)
    if mechanism is None:
        return None
    return SiteLevel(mechanism, KeyedRandomness(config.seed, COORDINATOR) if seeded else SystemRandomness())
