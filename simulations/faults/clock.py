"""The simulated clock, and how long a site takes for a round.

A site and round take

    down = latency + 8 x bytes down / (10⁶ x Mbit/s)
    compute = tokens / (tokens/s x speed), or steps x seconds of a step / speed
    up = latency + 8 x bytes up / (10⁶ x Mbit/s)

each times one log-normal factor for the site and round. Links of different sites do not share anything, and the
coordinator itself takes no time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from common.config.simulation import ProfileConfig
from common.randomness import numpy_generator


@dataclass(frozen=True)
class SiteSeconds:
    """Simulated seconds of one site in one round.

    Attributes:
        compute: training.
        up: the reply on its way to the coordinator.
        down: the request on its way to the site.
    """

    compute: float
    up: float
    down: float

    @property
    def total(self) -> float:
        """From the request until the reply is there."""
        return self.down + self.compute + self.up

    def as_dict(self) -> dict[str, float]:
        """Return plain values for ``metrics.jsonl``."""
        return asdict(self)


def site_seconds(
    profile: ProfileConfig | None, bytes_down: int, bytes_up: int, steps: int, tokens: int, factor: float = 1.0
) -> SiteSeconds:
    """Return what a site and round take; see the module.

    Args:
        profile: the site's class; None takes no time.
        bytes_down: of the request.
        bytes_up: of the reply.
        steps: training steps done.
        tokens: tokens trained on, without padding; not used where the profile has no tokens_per_s.
        factor: on all of it.
    """
    if profile is None:
        return SiteSeconds(0.0, 0.0, 0.0)
    compute = 0.0
    if profile.tokens_per_s is not None:
        compute = tokens / (profile.tokens_per_s * profile.speed)
    elif profile.step_s is not None:
        compute = steps * profile.step_s / profile.speed
    up = profile.latency_s + _link_seconds(bytes_up, profile.up_mbit_s)
    down = profile.latency_s + _link_seconds(bytes_down, profile.down_mbit_s)
    return SiteSeconds(factor * compute, factor * up, factor * down)


def jitter_factor(sigma: float, seed: int, number: int, site: str) -> float:
    """Return the factor on the seconds of a site and round: exp(sigma z), z standard normal."""
    return math.exp(sigma * float(numpy_generator(seed, "jitter", number, site).standard_normal())) if sigma else 1.0


def _link_seconds(size_bytes: int, mbit_s: float | None) -> float:
    return 0.0 if mbit_s is None else 8.0 * size_bytes / (1e6 * mbit_s)


@dataclass
class SimulatedClock:
    """A clock that jumps from one arrival to the next; nobody waits for it.

    Attributes:
        time_s: now, from 0 at the start of this process' part of the run.
        arrivals: when each expected message arrives, by message id; inf for one of a later round.
    """

    time_s: float = 0.0
    arrivals: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Return the simulated seconds."""
        return self.time_s

    def wait(self, deadline: float) -> None:
        """Jump to the next arrival, or to ``deadline`` where nothing arrives before it."""
        coming = min((at for at in self.arrivals.values() if at > self.time_s), default=math.inf)
        until = min(coming, deadline)
        if until < math.inf:
            self.time_s = max(self.time_s, until)

    def rest(self, until: float) -> None:
        """Jump, as :meth:`wait` does: what arrives meanwhile is taken in its time."""
        self.wait(until)
