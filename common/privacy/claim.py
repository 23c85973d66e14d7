"""What a run guarantees, for whom and trusting whom, generated from the mechanism."""

from __future__ import annotations

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
    target = privacy.target_epsilon
    budget = f"ε ≤ {target:g}" if target is not None else f"noise multiplier {privacy.noise_multiplier:g}"
    claim = (
        f"Example-level differential privacy at each site: {budget}, δ = {privacy.delta:g} over all rounds of this "
        f"run, for adding or removing one record (DP-SGD, Poisson sampling, clip norm {privacy.clip_norm:g}, "
        f"{privacy.accountant.upper()} accountant). It holds for each site's records against the coordinator, the "
        "other sites and whoever gets the adapter, and needs trust in none of them. The number of records of a site "
        "is taken as public. A person with several records, or a record held at several sites, is protected less; "
        "that a site takes part is not hidden. ε counts this run alone and each round once: nothing at the site yet "
        "refuses a coordinator that asks for a round again, or adds up runs on the same records."
    )
    if repeatable_noise:
        claim += (
            " This is a simulation: noise and sampling are drawn from the run's seed so that it can be repeated; "
            "whoever knows the seed can remove the noise."
        )
    return claim
