"""Which ways of running rounds go with which method and privacy, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.methods import METHODS, method_of

if TYPE_CHECKING:
    from common.config.run import RunConfig


def expect_rounds(config: RunConfig) -> None:
    """Check that over-selection, late updates and what happens below the minimum make sense with the rest.

    Raises:
        ValueError: naming the keys and the reason.
    """
    federation, name = config.federation, config.aggregation.method
    how = "mode 'async'" if federation.mode == "async" else "late 'carry'"
    if federation.carries and not method_of(config).optimizable:
        able = ", ".join(repr(known) for known, method in METHODS.items() if method.optimizable)
        raise ValueError(
            f"federation.{how} adds updates of earlier rounds, which under aggregation.method {name!r} are in other "
            f"coordinates than the present adapter; expected one of {able}"
        )
    if federation.carries and config.privacy.clipping == "adaptive":
        raise ValueError(
            f"federation.{how} is set with privacy.clipping 'adaptive', whose clip norm goes on from the round before; "
            "expected 'flat' or 'per_layer'"
        )
    if config.privacy.site_level_settings is None:
        return
    if federation.carries:
        raise ValueError(
            f"federation.{how} is set under site-level privacy, where a site is in a round with the probability that "
            "is accounted for and its update counts there or never; expected late 'drop' and mode 'sync'"
        )
    if federation.over_select > 1:
        raise ValueError(
            "federation.over_select is set under site-level privacy: who answers first would decide who counts, and "
            "not the probability that is accounted for; expected 1"
        )
    if federation.below_min != "stop":
        raise ValueError(
            f"federation.below_min {federation.below_min!r} is set under site-level privacy, where the number of sites "
            "in a round is left to chance; expected 'stop'"
        )


def round_warnings(config: RunConfig, members: int | None = None) -> tuple[str, ...]:
    """Return sentences on what is allowed and rarely wise; empty where nothing is.

    Args:
        config: the run config.
        members: sites that can take part, where that is known.
    """
    federation, found = config.federation, []
    if config.privacy.is_local and federation.over_select > 1:
        found.append(
            f"federation.over_select {federation.over_select:g} under differential privacy: a site that is asked "
            "spends its budget, also where the round closes before its update is there."
        )
    working = min(known) if (known := [n for n in (federation.sites_per_round, members) if n is not None]) else 0
    if federation.buffer_size is not None and working > federation.buffer_size * federation.max_staleness:
        found.append(
            f"federation.buffer_size {federation.buffer_size} with {working} sites at work: equally fast ones answer "
            f"{working / federation.buffer_size:.0f} rounds after they were asked, which is above max_staleness "
            f"{federation.max_staleness}, and much of their work counts nowhere. Raise buffer_size or max_staleness, "
            "or lower sites_per_round."
        )
    if federation.buffer_size is not None and working and federation.buffer_size > working:
        found.append(
            f"federation.buffer_size {federation.buffer_size} with {working} sites at work: a site counts once in a "
            f"round, which ends with {working} updates. Lower buffer_size."
        )
    return tuple(found)
