"""Which sites take part: those that described themselves, and the sample of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config.run import RunConfig
from common.errors import RunError
from common.methods import expect_rank
from common.privacy.accounting import Segment, epsilon_spent
from common.privacy.planning import steps_per_round
from common.randomness import numpy_generator
from common.wire import SiteDescription


@dataclass(frozen=True)
class Member:
    """A site of the federation as the coordinator knows it.

    Attributes:
        node_id: Flower's id of its node.
        description: what the site said of itself; its declared number of rows is the only weight it can have.
    """

    node_id: int
    description: SiteDescription

    @property
    def name(self) -> str:
        """The site's name."""
        return self.description.site

    def rank(self, config: RunConfig) -> int:
        """Return the rank of the site's factors.

        Raises:
            ConfigError: if it cannot hold the run's and the method needs one rank.
        """
        return expect_rank(config, self.description.max_rank, self.name)

    def weight(self, config: RunConfig) -> float:
        """Return the site's weight in the average, not normalised."""
        if config.aggregation.weights == "uniform":
            return 1.0
        return float(self.description.num_examples or 0)


def expect_enrolled(
    described: Mapping[int, SiteDescription],
    left_out: Mapping[int, str],
    enrolled: Mapping[int, str],
    config: RunConfig,
) -> tuple[dict[int, SiteDescription], dict[int, str]]:
    """Leave out the nodes that call themselves otherwise than their keys were enrolled: a site speaks for itself alone.

    Args:
        described: descriptions by node id.
        left_out: reasons by node id of those left out already.
        enrolled: names by node id.
        config: the run config.

    Returns:
        Both, with those nodes moved from one to the other.

    Raises:
        RunError: if fewer than ``federation.min_sites`` remain.
    """
    kept = {node: told for node, told in described.items() if enrolled.get(node) == told.site}
    reasons = dict.fromkeys(described.keys() - kept.keys(), "it calls itself otherwise than its key was enrolled")
    if len(kept) < config.federation.min_sites:
        raise RunError(
            f"{len(kept)} sites call themselves as they were enrolled; expected at least {config.federation.min_sites} "
            "(federation.min_sites). The name in a site's config must be the one of its kit."
        )
    return kept, {**left_out, **reasons}


def admit_members(
    descriptions: Mapping[int, SiteDescription], config: RunConfig, base: str, initial: str
) -> dict[str, Member]:
    """Check descriptions and return the members by site name, sorted.

    Args:
        descriptions: by node id.
        config: the run config.
        base: fingerprint of the coordinator's base model.
        initial: fingerprint of the initial adapter.

    Raises:
        RunError: for another base model, another initial adapter, two sites of one name, a missing declaration,
            a mechanism that does not keep the budget.
    """
    members: dict[str, Member] = {}
    for node_id, description in descriptions.items():
        site = description.site
        if site in members:
            raise RunError(f"two nodes call themselves {site!r}; expected one. Rename or stop one of them.")
        if description.base_fingerprint != base:
            raise RunError(
                f"site {site!r} has base model {description.base_fingerprint[:12]}; expected {base[:12]}. "
                "Install the same weights there."
            )
        if description.initial_fingerprint != initial:
            raise RunError(
                f"site {site!r} derives another initial adapter from the seed; expected the same. "
                "Install the same versions of torch and fedtune there."
            )
        _expect_mechanism(description, config)
        if config.aggregation.weights == "examples" and description.num_examples is None:
            raise RunError(f"site {site!r} declares no number of rows; expected one for weights 'examples'.")
        members[site] = Member(node_id, description)
        members[site].rank(config)
    if len({member.description.seeded for member in members.values()}) > 1:
        raise RunError(
            "some sites draw their noise from the run's seed and some do not; expected virtual sites or real ones, not "
            "both. Run them apart."
        )
    return dict(sorted(members.items()))


def _expect_mechanism(description: SiteDescription, config: RunConfig) -> None:
    """Check that what a site plans keeps the run's budget.

    Raises:
        RunError: for another privacy unit, other steps, or an ε above the run's.
    """
    site, planned, privacy = description.site, description.mechanism, config.privacy
    if (planned is None) == privacy.is_local:
        raise RunError(f"site {site!r} plans another privacy unit; expected {privacy.unit!r}.")
    if planned is None:
        return
    if planned.steps != steps_per_round(config, 1.0 / planned.sample_rate):
        raise RunError(f"site {site!r} plans {planned.steps} steps a round; expected those of the run config.")
    target = privacy.target_epsilon
    if target is None:
        if planned.noise_multiplier != privacy.noise_multiplier:
            raise RunError(f"site {site!r} plans another noise multiplier; expected {privacy.noise_multiplier:g}.")
        return
    whole = Segment(planned.noise_multiplier, planned.sample_rate, planned.steps * config.federation.rounds)
    spent = epsilon_spent([whole], privacy.delta, privacy.accountant)
    if not spent <= target + 1e-6:
        raise RunError(f"site {site!r} would spend ε {spent:.2f}; expected at most {target:g}.")


def sample_cohort(names: Sequence[str], config: RunConfig, round_number: int) -> list[str]:
    """Return the sites of a round, sorted: all, or as many as are asked, drawn by seed and round.

    Who owes an update or asks for one has no part in it: a resumed round draws the same sites.
    """
    wanted = number_asked(config)
    if wanted is None or wanted >= len(names):
        return sorted(names)
    draw = numpy_generator(config.seed, "cohort", round_number)
    return sorted(draw.choice(sorted(names), size=wanted, replace=False).tolist())


def number_asked(config: RunConfig) -> int | None:
    """Return how many sites a round asks, over-selection included; None for all."""
    wanted = config.federation.sites_per_round
    return None if wanted is None else math.ceil(round(config.federation.over_select * wanted, 9))


def number_closing(config: RunConfig) -> int | None:
    """Return the number of admitted updates at which a round closes; None where it waits for all it asked."""
    federation = config.federation
    if federation.mode == "async":
        return federation.buffer_size
    return federation.sites_per_round if federation.over_select > 1 else None
