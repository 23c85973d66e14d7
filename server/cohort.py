"""Which sites take part: those that described themselves, and the sample of a round."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.config.run import RunConfig
from common.errors import FedtuneError, RunError
from common.methods import expect_rank
from common.privacy.accounting import Segment, epsilon_spent
from common.privacy.planning import steps_per_round
from common.randomness import numpy_generator
from common.wire import SiteDescription
from server.aggregation.robust import expect_enough_sites

logger = logging.getLogger(__name__)


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


def admit_members(
    descriptions: Mapping[int, SiteDescription],
    config: RunConfig,
    base: str,
    initial: str,
    enrolled: Mapping[int, str] | None = None,
    known: Iterable[Member] = (),
) -> tuple[dict[str, Member], dict[int, str]]:
    """Check what sites said of themselves.

    Left out are sites with another base model or initial adapter, without a declaration that the run needs, whose
    mechanism does not keep the budget, or that cannot hold the run's rank; those that call themselves otherwise than
    their keys were enrolled, as a site speaks for itself alone; two that have one name, as neither can be believed; and
    virtual sites and real ones together, of which the real ones stay, or those that were first.

    Args:
        descriptions: by node id.
        config: the run config.
        base: fingerprint of the coordinator's base model.
        initial: fingerprint of the initial adapter.
        enrolled: names by node id, where each site has a key of its own.
        known: members that the run has already.

    Returns:
        The members by site name, sorted, and the reasons of the other nodes.
    """
    own = {node: told for node, told in descriptions.items() if enrolled is None or enrolled.get(node) == told.site}
    names = Counter(told.site for told in own.values())
    others = {member.description.seeded for member in known} or {all(told.seeded for told in own.values())}
    members: dict[str, Member] = {}
    left_out: dict[int, str] = {}
    for node, description in descriptions.items():
        site = description.site
        try:
            if node not in own:
                raise RunError(
                    "a site calls itself otherwise than its key was enrolled; expected the name of its kit. Correct "
                    "its site config."
                )
            if names[site] > 1:
                raise RunError(f"two nodes call themselves {site!r}; expected one. Rename or stop one of them.")
            if description.seeded not in others:
                draws, others_do = ("draws", "do not") if description.seeded else ("does not draw", "do")
                raise RunError(
                    f"site {site!r} {draws} its noise from the run's seed and others {others_do}; expected virtual "
                    "sites or real ones, not both. Run them apart."
                )
            _expect_same_model(description, base, initial)
            _expect_mechanism(description, config)
            if description.num_examples is None and (what := _needs_rows(config)):
                raise RunError(f"site {site!r} declares no number of rows; expected one for {what}.")
            member = Member(node, description)
            member.rank(config)
        except FedtuneError as error:
            left_out[node] = str(error)
        else:
            members[site] = member
    return dict(sorted(members.items())), left_out


def expect_members(members: int, left_out: Mapping[int, str], config: RunConfig, *, everyone: bool = False) -> None:
    """Say who is left out, and check that enough are not.

    Args:
        members: their number.
        left_out: reasons by node id.
        config: the run config.
        everyone: whether none may be left out.

    Raises:
        RunError: if fewer than ``federation.min_sites`` can take part.
    """
    if everyone and left_out:
        raise RunError(next(iter(left_out.values())))
    for node, reason in left_out.items():
        logger.warning("node %s is left out of the run: %s", node, reason)
    if members < config.federation.min_sites:
        first = "".join(f" First of {len(left_out)} left out: {reason}" for reason in [*left_out.values()][:1])
        raise RunError(
            f"{members} sites can take part; expected at least {config.federation.min_sites} "
            f"(federation.min_sites).{first}"
        )


def _needs_rows(config: RunConfig) -> str | None:
    """Return what a site's number of rows is needed for; None for nothing."""
    if config.aggregation.weights == "examples":
        return "weights 'examples'"
    return "control variates, whose steps follow from it" if config.training.control_variates else None


def _expect_same_model(description: SiteDescription, base: str, initial: str) -> None:
    if description.base_fingerprint != base:
        raise RunError(
            f"site {description.site!r} has base model {description.base_fingerprint[:12]}; expected {base[:12]}. "
            "Install the same weights there."
        )
    if description.initial_fingerprint != initial:
        raise RunError(
            f"site {description.site!r} derives another initial adapter from the seed; expected the same. "
            "Install the same versions of torch and fedtune there."
        )


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
    """Return the sites of a round, drawn by seed and round: all, or as many as are asked, sorted.

    In mode async they are all of them in the order in which they get their turns: were it the same in every round, the
    last of it would never get one where fewer may work than there are. Who owes an update or asks for one has no part
    in the draw: a resumed round draws the same sites.
    """
    wanted, draw = number_asked(config), numpy_generator(config.seed, "cohort", round_number)
    if config.federation.mode == "async":
        return draw.permutation(sorted(names)).tolist()  # type: ignore[no-any-return]  # of str
    if wanted is None or wanted >= len(names):
        return sorted(names)
    return sorted(draw.choice(sorted(names), size=wanted, replace=False).tolist())


def number_asked(config: RunConfig) -> int | None:
    """Return how many sites a round asks, over-selection included; None for all."""
    wanted = config.federation.sites_per_round
    return None if wanted is None else math.ceil(round(config.federation.over_select * wanted, 9))


def expect_rule_holds(config: RunConfig, members: int) -> None:
    """Check that a round counts as many sites as its robust rule needs.

    Args:
        config: the run config.
        members: sites that can take part.

    Raises:
        RunError: if bad ones could move the aggregate at will.
    """
    settings = config.aggregation
    if settings.robust != "none":
        federation = config.federation
        counted = min(number_closing(config) or federation.sites_per_round or members, members)
        closing = federation.mode == "async" and counted == federation.buffer_size
        where = "a round that closes at federation.buffer_size" if closing else "a round"
        expect_enough_sites(settings.robust, settings.robust_sites, counted, where)


def number_closing(config: RunConfig) -> int | None:
    """Return the number of admitted updates at which a round closes; None where it waits for all it asked."""
    federation = config.federation
    if federation.mode == "async":
        return federation.buffer_size
    return federation.sites_per_round if federation.over_select > 1 else None
