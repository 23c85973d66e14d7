"""Which sites are of which device class, and which are hostile: seeded choices of whole numbers of sites."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from common.config.simulation import AttackConfig, ProfileConfig, SimulationConfig
from common.errors import ConfigError
from common.randomness import numpy_generator


def profiles_of(config: SimulationConfig, sites: Sequence[str], seed: int) -> dict[str, ProfileConfig]:
    """Return the profile of every site; an empty dict where there are no profiles.

    Sites that no profile names are dealt in a seeded order, so many to each profile as its share gives by largest
    remainders.

    Raises:
        ConfigError: for a name that no site has, or a site that would have no profile.
    """
    found: dict[str, ProfileConfig] = {}
    for profile in config.profiles:
        expect_known(profile.sites or (), sites, f"simulation.profiles {profile.name!r}")
        found |= dict.fromkeys(profile.sites or (), profile)
    shared = [profile for profile in config.profiles if profile.share is not None]
    left = shuffled([site for site in sorted(sites) if site not in found], seed, "profiles")
    if not shared:
        if found and left:
            raise ConfigError(
                f"simulation.profiles names no profile for site {min(left)!r}; expected one for every site. "
                "Name it, or add a profile with share: 1."
            )
        return found
    counts = apportion([profile.share or 0.0 for profile in shared], len(left))
    dealt = [profile for profile, count in zip(shared, counts, strict=True) for _ in range(count)]
    return found | dict(zip(left, dealt, strict=True))


def hostile_sites(attack: AttackConfig, index: int, sites: Sequence[str], seed: int) -> frozenset[str]:
    """Return the sites that carry out an attack.

    Args:
        attack: the attack.
        index: its place in the list of attacks, which keys the choice.
        sites: all sites.
        seed: of the run.

    Raises:
        ConfigError: for a name that no site has, or a share that gives no site.
    """
    if attack.share is None:
        expect_known(attack.sites or (), sites, f"simulation.attacks {attack.name!r}")
        return frozenset(attack.sites or ())
    count = math.floor(attack.share * len(sites) + 0.5)
    if count == 0:
        raise ConfigError(
            f"simulation.attacks {attack.name!r}: share {attack.share:g} of {len(sites)} sites is none; expected "
            "at least one. Raise the share."
        )
    return frozenset(shuffled(sorted(sites), seed, f"hostile {index}")[:count])


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers that add up to ``total`` and differ from shares x total by less than 1 (largest remainders).

    Args:
        shares: not negative, adding up to 1.
        total: what is dealt out.
    """
    exact = [share * total / math.fsum(shares) for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: (round(counts[place] - exact[place], 9), place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def shuffled(names: Sequence[str], seed: int, purpose: str) -> list[str]:
    """Return the names in the order that is drawn for a purpose."""
    return [names[place] for place in numpy_generator(seed, purpose).permutation(len(names))]


def expect_known(names: Sequence[str], sites: Sequence[str], where: str) -> None:
    """Check that names are those of sites.

    Raises:
        ConfigError: naming the nearest site.
    """
    for name in names:
        if name not in sites:
            close = difflib.get_close_matches(name, sites, n=1, cutoff=0.0)
            raise ConfigError(f"{where} names site {name!r}; expected one of the data's sites, such as {close[0]!r}.")
