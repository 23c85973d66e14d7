"""Config section ``simulation``: what goes wrong and how long things take, in a simulation only.

The coordinator's ServerApp and a real site refuse a run config that has this section: there, faults are real.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section

AttackName = Literal[
    "extra_key", "missing_key", "renamed_key", "wrong_shape", "broadcastable_shape", "wrong_dtype", "nan", "infinity",
    "denormal_flood", "huge_norm", "sign_flip", "scale_1000", "replay", "duplicate", "wrong_base", "oversized",
    "negative_weight", "huge_weight", "gaussian_noise",
]  # fmt: skip
SiteNames = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
RoundNumber = Annotated[int, Field(ge=1)]


class ProfileConfig(Section):
    """A class of devices and links, and the sites that are of it."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """What to call it."""
    share: Share | None = None
    """Share of the sites that no profile names; which ones is a seeded choice. All shares add up to 1."""
    sites: SiteNames | None = None
    """Names of its sites, instead of a share."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Training speed as measured on such a device: tokens that exist, not padding. Without it or step_s, training
    takes no simulated time."""
    step_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds of one training step, instead of tokens_per_s."""
    speed: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the training speed: 0.25 is four times as slow."""
    up_mbit_s: Annotated[float, Field(gt=0)] | None = None
    """Link from the site, in Mbit/s (10⁶ bits); without limit if not given."""
    down_mbit_s: Annotated[float, Field(gt=0)] | None = None
    """Link to the site, in Mbit/s; without limit if not given."""
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a message takes besides its bytes, each way."""
    dropout: Probability | None = None
    """Probability that a site of this class drops out of a round, instead of simulation.dropout."""

    @model_validator(mode="after")
    def _one_of_each(self) -> ProfileConfig:
        if (self.share is None) == (self.sites is None):
            raise ValueError(f"share and sites of profile {self.name!r}: expected one of the two")
        if self.tokens_per_s is not None and self.step_s is not None:
            raise ValueError(f"tokens_per_s and step_s of profile {self.name!r} are both set; expected one of them")
        return self


class WindowConfig(Section):
    """Rounds in which a site is there. A site may have several windows; one without any is always there."""

    site: Annotated[str, Field(min_length=1)]
    """Name of the site."""
    from_round: RoundNumber = 1
    """First round in which it is there."""
    to_round: RoundNumber | None = None
    """Last round in which it is there; to the end if not given."""

    @model_validator(mode="after")
    def _ordered(self) -> WindowConfig:
        _expect_ordered(self.from_round, self.to_round)
        return self


class ChurnConfig(Section):
    """Sites that come and go: a two-state Markov chain for each, begun in its stationary distribution."""

    leave: Annotated[float, Field(gt=0, le=1)]
    """Probability that a site that is there is gone in the next round."""
    join: Annotated[float, Field(gt=0, le=1)]
    """Probability that a site that is gone is there in the next round."""


class StaleConfig(Section):
    """Updates that arrive when later rounds are under way."""

    probability: Probability
    """Probability that the update of a site and round is late so."""
    rounds: RoundNumber = 1
    """Rounds by which it is late."""


class AttackConfig(Section):
    """Hostile sites. Every attack changes what such a site sends; training and data stay honest."""

    name: AttackName
    """What they do."""
    sites: SiteNames | None = None
    """Names of the hostile sites."""
    share: Share | None = None
    """Share of the sites that are hostile, instead of names; which ones is a seeded choice."""
    from_round: RoundNumber = 1
    """First round of the attack. A weight is declared before the first round, whatever this says."""
    to_round: RoundNumber | None = None
    """Last round of the attack; to the end if not given."""

    @model_validator(mode="after")
    def _sites_and_rounds(self) -> AttackConfig:
        if (self.share is None) == (self.sites is None):
            raise ValueError(f"share and sites of attack {self.name!r}: expected one of the two")
        _expect_ordered(self.from_round, self.to_round)
        return self


class SimulationConfig(Section):
    """Faults and time. Every choice is drawn by (seed, purpose, round, site): engine and order do not matter."""

    dropout: Probability = 0.0
    """Probability that a site that was asked never answers, each round anew."""
    notice_s: Annotated[float, Field(ge=0)] | None = 60.0
    """Simulated seconds after which the coordinator learns that a site is gone (Flower gives a node up after two
    heartbeats of 30 s); null: never, so that it waits until federation.round_timeout_s."""
    jitter: Annotated[float, Field(ge=0, le=3)] = 0.0
    """Standard deviation of the logarithm of a factor, of median 1, on the seconds of a site and round."""
    profiles: Annotated[tuple[ProfileConfig, ...], Field(strict=False)] = ()
    """Classes of devices and links; without any, nothing takes simulated time."""
    windows: Annotated[tuple[WindowConfig, ...], Field(strict=False)] = ()
    """Sites that join late or leave early."""
    churn: ChurnConfig | None = None
    """Sites that come and go at random."""
    stale: StaleConfig | None = None
    """Updates that arrive when later rounds are under way."""
    attacks: Annotated[tuple[AttackConfig, ...], Field(strict=False)] = ()
    """Hostile sites. Where several are for one site, they apply in this order."""

    @model_validator(mode="after")
    def _profiles_agree(self) -> SimulationConfig:
        names = [profile.name for profile in self.profiles]
        if len(set(names)) != len(names):
            raise ValueError("profiles has a name twice; expected each once")
        named = [site for profile in self.profiles for site in profile.sites or ()]
        if len(set(named)) != len(named):
            raise ValueError("profiles names a site twice; expected each once")
        shares = [profile.share for profile in self.profiles if profile.share is not None]
        if shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"profiles have shares that add up to {sum(shares):g}; expected 1")
        return self


def _expect_ordered(first: int, last: int | None) -> None:
    if last is not None and last < first:
        raise ValueError(f"to_round {last} is before from_round {first}; expected it at or after")
