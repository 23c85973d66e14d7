"""What a run guarantees, for whom and trusting whom, generated from the run config.

===========  ==========================  ====================================  ==================================
unit         protected                   against                               trusting
===========  ==========================  ====================================  ==================================
``example``  a record of a site          coordinator, other sites, adapter     nobody but the site itself
``user``     a person's records there    coordinator, other sites, adapter     nobody but the site itself
``site``     a site as a whole           whoever gets the adapters             the coordinator
``none``     nothing
===========  ==========================  ====================================  ==================================

Two units may hold at once (``privacy.site_level``). They are two statements, not one: an ε for a record and an ε for a
site do not add up, since they bound different things.
"""

from __future__ import annotations

from common.config.privacy import SiteLevelConfig
from common.config.run import RunConfig


def privacy_claim(config: RunConfig, repeatable_noise: bool) -> str:
    """Return the claim of a run in plain sentences.

    Args:
        config: the run config.
        repeatable_noise: whether noise and sampling come from the run's seed (virtual sites).
    """
    privacy = config.privacy
    if privacy.unit == "none":
        return (
            "No differential privacy: updates are exact functions of the sites' records, and the coordinator and "
            "whoever holds the adapter may learn about single records from them."
        )
    parts = []
    if privacy.is_local:
        parts += [_local_claim(config), _local_limits(config)]
    settings = privacy.site_level_settings
    if settings is not None:
        parts.append(_site_claim(settings, alone=not privacy.is_local))
    if privacy.is_local and settings is not None:
        parts.append("These are two guarantees for two units; their ε do not add up and neither strengthens the other.")
    if repeatable_noise:
        parts.append(
            "This is a simulation: noise and sampling are drawn from the run's seed so that it can be repeated; "
            "whoever knows the seed can remove the noise."
        )
    return " ".join(parts)


def _budget(target: float | None, noise: float | None, delta: float) -> str:
    amount = f"ε ≤ {target:g}" if target is not None else f"noise multiplier {noise:g}"
    return f"{amount}, δ = {delta:g} over all rounds of this run"


def _local_claim(config: RunConfig) -> str:
    privacy = config.privacy
    user = privacy.unit == "user"
    kind = "User-level" if user else "Example-level"
    neighbours = "a person with all records that name them at the site" if user else "one record"
    clipped = "each person's summed gradient clipped" if user else "each record's gradient clipped"
    how = {"flat": f"to norm {privacy.clip_norm:g}", "per_layer": f"by layer, to norm {privacy.clip_norm:g} in all",
           "adaptive": f"at a noisy {privacy.clip_quantile:g}-quantile"}[privacy.clipping]  # fmt: skip
    sampled = "persons" if user else "records"
    budget = _budget(privacy.target_epsilon, privacy.noise_multiplier, privacy.delta)
    return (
        f"{kind} differential privacy at each site: {budget}, "
        f"for adding or removing {neighbours} (DP-SGD, Poisson sampling of {sampled}, {clipped} {how}, "
        f"{privacy.accountant.upper()} accountant). It holds for each site's {sampled} against the coordinator, the "
        "other sites and whoever gets the adapter, and needs trust in none of them."
    )


def _local_limits(config: RunConfig) -> str:
    privacy = config.privacy
    if privacy.unit == "user":
        limits = (
            "The number of persons of a site is taken as public. A person whose records lie at k sites, or under k "
            "names, is protected less: budgets add up over sites, and k names count as a group of k."
        )
    else:
        limits = (
            "The number of records of a site is taken as public. A person with k records is protected as a group of k: "
            "by k ε and δ (e^(k ε) - 1) / (e^ε - 1), which is little from two or three on. A record held at several "
            "sites is protected once for each of them: those budgets add up."
        )
    limits += (
        " That a site takes part is not hidden, nor how long it takes, nor that it fails or refuses. All this presumes "
        "that the site runs code it installed or verified itself."
    )
    if privacy.release_loss:
        limits += (
            f" A noisy training loss (each cut to {privacy.loss_bound:g} nats) leaves each site and is part of this "
            "budget."
        )
    return (
        f"{limits} ε counts this run alone and each round once; a real site's ledger adds up its runs and answers a "
        "round that is asked for again with the same bytes."
    )


def _site_claim(settings: SiteLevelConfig, *, alone: bool) -> str:
    budget = _budget(settings.target_epsilon, settings.noise_multiplier, settings.delta)
    claim = (
        f"Site-level differential privacy at the coordinator: {budget}, "
        f"for adding or removing one site with all its records (each update clipped to norm {settings.clip_norm:g} on "
        "arrival, Gaussian noise on the sum, division by the expected number of sites, uniform weights, "
        f"{settings.accountant.upper()} accountant). It holds against whoever gets the adapters of any rounds, other "
        "sites included, and trusts the coordinator, who sees each update before the noise and must not publish who "
        "took part. The number of sites is taken as public."
    )
    if alone:
        claim += " No single record is hidden from the coordinator."
    return claim
