"""The faults of a run, ready to be asked: what befalls a site in a round, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from common.config.federation import FederationConfig
from common.config.run import RunConfig
from common.config.simulation import AttackConfig, AttackName, ProfileConfig, SimulationConfig
from common.errors import ConfigError
from simulations.faults.availability import drops_out, is_there, rounds_late
from simulations.faults.classes import expect_known, hostile_sites, profiles_of
from simulations.faults.clock import SiteSeconds, jitter_factor, site_seconds

ATTACK_NAMES: tuple[AttackName, ...] = get_args(AttackName)

Tokens = Callable[[str, int, int], int]
"""Site, round and steps to the tokens trained on."""


@dataclass(frozen=True)
class Faults:
    """What a run config's ``simulation`` section says of its sites.

    Attributes:
        config: the section.
        seed: of the run.
        sites: names of the sites, in the order of the data.
        profiles: class of every site; empty where there are none.
        hostile: each attack with the sites that carry it out.
    """

    config: SimulationConfig
    seed: int
    sites: tuple[str, ...]
    profiles: dict[str, ProfileConfig]
    hostile: tuple[tuple[AttackConfig, frozenset[str]], ...]

    @classmethod
    def of(cls, config: RunConfig, sites: Sequence[str]) -> Faults | None:
        """Return the faults of a run, None without a ``simulation`` section.

        Raises:
            ConfigError: for a name that no site has, or a share that gives no site.
        """
        section = config.simulation
        if section is None:
            return None
        expect_known([window.site for window in section.windows], sites, "simulation.windows")
        hostile = tuple(
            (attack, hostile_sites(attack, index, sites, config.seed)) for index, attack in enumerate(section.attacks)
        )
        if any(attack.name == "huge_weight" for attack, _ in hostile) and config.privacy.unit != "none":
            raise ConfigError(
                "simulation.attacks 'huge_weight' declares rows, which nobody declares under DP; expected privacy.unit "
                "'none'. Remove the attack."
            )
        return cls(section, config.seed, tuple(sites), profiles_of(section, sites, config.seed), hostile)

    def answers(self, site: str, number: int) -> bool:
        """Whether a site that is asked in a round is there and does not drop out of it."""
        profile = self.profiles.get(site)
        own = profile.dropout if profile is not None else None
        probability = self.config.dropout if own is None else own
        return is_there(self.config, self.seed, number, site) and not drops_out(probability, self.seed, number, site)

    def rounds_late(self, site: str, number: int) -> int:
        """Return by how many rounds the update of a site and round is late; 0 in time."""
        return rounds_late(self.config, self.seed, number, site)

    def attacks(self, site: str, number: int) -> list[AttackName]:
        """Return what a site does in a round, in order; round 0 is the description before the first round."""
        return [
            attack.name
            for attack, sites in self.hostile
            if site in sites
            and (number == 0 or attack.from_round <= number <= (attack.to_round or number))
        ]  # fmt: skip

    def replays(self, site: str) -> bool:
        """Whether a site needs its old answers."""
        return any(attack.name == "replay" and site in sites for attack, sites in self.hostile)

    def seconds(
        self, site: str, number: int, bytes_down: int, bytes_up: int, steps: int, tokens: Tokens
    ) -> SiteSeconds:
        """Return the simulated seconds of a site and round.

        Args:
            site: its name.
            number: of the round.
            bytes_down: of the request.
            bytes_up: of the reply.
            steps: training steps done.
            tokens: counts tokens, asked only where the site's profile needs them.
        """
        profile = self.profiles.get(site)
        counted = tokens(site, number, steps) if profile is not None and profile.tokens_per_s is not None else 0
        factor = jitter_factor(self.config.jitter, self.seed, number, site)
        return site_seconds(profile, bytes_down, bytes_up, steps, counted, factor)

    def describe(self, federation: FederationConfig) -> list[str]:
        """Return one or two lines on what is configured.

        Args:
            federation: for the number of rounds and their deadline.
        """
        config = self.config
        asked = [(site, number) for site in self.sites for number in range(1, federation.rounds + 1)]
        there = sum(self.answers(site, number) for site, number in asked)
        late = sum(bool(self.rounds_late(site, number)) for site, number in asked)
        classes = ", ".join(
            f"{sum(own.name == profile.name for own in self.profiles.values())} {profile.name}"
            for profile in config.profiles
        )
        time = f"sites by class: {classes}" if classes else "no profiles, so that nothing takes simulated time"
        first = (
            f"Simulated. {time}; of {len(asked)} site rounds {there} answer"
            + (f", {late} of all with an update that is rounds late" if config.stale else "")
            + f"; deadline {federation.round_timeout_s:g} simulated seconds"
        )
        attacks = "; ".join(f"{attack.name} by {', '.join(sorted(sites))}" for attack, sites in self.hostile)
        return [first] + ([f"Hostile. {attacks}"] if attacks else [])
