"""Which sites are there in a round, which drop out of it, and whose update comes rounds late.

Every choice is a function of (seed, purpose, round, site), so that it depends neither on the engine nor on the order in
which sites are asked, and a resumed run repeats it.
"""

from __future__ import annotations

from functools import lru_cache

from common.config.simulation import ChurnConfig, SimulationConfig, WindowConfig
from common.randomness import numpy_generator


def uniform(seed: int, purpose: str, number: int, site: str) -> float:
    """Return the number in [0, 1) that is drawn for a purpose, round and site."""
    return float(numpy_generator(seed, purpose, number, site).random())


def is_there(config: SimulationConfig, seed: int, number: int, site: str) -> bool:
    """Whether a site is part of the federation in a round: inside a window of its own, and not gone by churn."""
    return in_window(config.windows, number, site) and (
        config.churn is None or is_present(config.churn, seed, number, site)
    )


def in_window(windows: tuple[WindowConfig, ...], number: int, site: str) -> bool:
    """Whether a round is in one of a site's windows; without any it always is."""
    own = [window for window in windows if window.site == site]
    return not own or any(
        window.from_round <= number and (window.to_round is None or number <= window.to_round) for window in own
    )


@lru_cache(maxsize=65536)
def is_present(churn: ChurnConfig, seed: int, number: int, site: str) -> bool:
    """Whether the site's Markov chain is in its state "there" in a round.

    The chain has P(there → gone) = ``leave`` and P(gone → there) = ``join``. It starts in its stationary distribution,
    P(there) = join / (join + leave), so that every round has this share in expectation. The state is walked from
    round 1 with one draw a round, so that it is the same whichever rounds are asked for.
    """
    there = uniform(seed, "churn", 0, site) < churn.join / (churn.join + churn.leave)
    for passed in range(1, number):
        draw = uniform(seed, "churn", passed, site)
        there = draw >= churn.leave if there else draw < churn.join
    return there


def drops_out(probability: float, seed: int, number: int, site: str) -> bool:
    """Whether a site that was asked never answers in this round."""
    return uniform(seed, "dropout", number, site) < probability


def rounds_late(config: SimulationConfig, seed: int, number: int, site: str) -> int:
    """Return by how many rounds the update of a site and round is late; 0 in time."""
    stale = config.stale
    if stale is None or uniform(seed, "stale", number, site) >= stale.probability:
        return 0
    return stale.rounds
