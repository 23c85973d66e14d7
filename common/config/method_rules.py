"""Which aggregation methods go with which adapter, privacy and server optimizer, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.factor_names import A, B
from common.methods import METHODS, method_of

if TYPE_CHECKING:
    from common.config.run import RunConfig

_LARGE_SERVER_LR = 0.1
"""Server rate beyond which a warning is due under an adaptive optimizer, which moves every entry by about the rate."""
_OF_UPDATES = ("norm_clip", "median", "trimmed_mean")
"""Robust rules that make an aggregate of updates; the others weigh whole sites."""


def expect_method(config: RunConfig) -> None:
    """Check that the aggregation method makes sense with the rest of the run config.

    Raises:
        ValueError: naming the two keys and the reason.
    """
    name, method = config.aggregation.method, method_of(config)
    kind = config.adapter.kind
    if kind != "lora" and name != "fedit":
        raise ValueError(f"aggregation.method {name!r} needs LoRA factors; expected 'fedit' for kind {kind!r}")
    if config.privacy.site_level_settings is not None and not method.linear:
        raise ValueError(
            f"aggregation.method {name!r} is no sum of updates, so that noise on a sum protects no site; expected one "
            f"of {_named(linear=True)} under site-level privacy"
        )
    if method.core and config.model.quantization != "none":
        raise ValueError(
            f"aggregation.method {name!r} starts from singular vectors of the base weights, which "
            f"quantization {config.model.quantization!r} does not hold; expected 'none'"
        )
    optimizer = config.aggregation.server_optimizer
    if optimizer != "none" and not method.optimizable:
        raise ValueError(
            f"aggregation.server_optimizer {optimizer!r} needs an update in the same coordinates every round, which "
            f"{name!r} does not have; expected one of {_named(optimizable=True)}, or 'none'"
        )
    if config.aggregation.robust in _OF_UPDATES and not method.linear:
        raise ValueError(
            f"aggregation.robust {config.aggregation.robust!r} takes the place of a weighted mean of updates, which "
            f"{name!r} does not make; expected a rule that weighs sites ('multi_krum', 'krum', 'geometric_median'), "
            "or 'none'"
        )
    if config.aggregation.robust == "geometric_median" and name == "hetlora":
        raise ValueError(
            "aggregation.robust 'geometric_median' gives a far site a small weight, and 'hetlora' weighs sites by "
            "their norm, which gives it back; expected a rule that leaves sites out ('multi_krum', 'krum'), or 'none'"
        )
    if config.aggregation.robust != "none" and config.privacy.site_level_settings is not None:
        raise ValueError(
            f"aggregation.robust {config.aggregation.robust!r} is set under site-level privacy, whose noise is planned "
            "for a clipped sum; expected 'none', clipping is on already"
        )
    _expect_bounds(config)
    ranks = config.federation.virtual_ranks
    if min(ranks, default=config.adapter.rank) < config.adapter.rank and not method.mixed_ranks:
        raise ValueError(
            f"aggregation.method {name!r} needs all sites at one rank, but federation.virtual_ranks has "
            f"{min(ranks)} below adapter.rank {config.adapter.rank}; expected one of {_named(mixed_ranks=True)}"
        )


def _expect_bounds(config: RunConfig) -> None:
    """Check that what bounds an update's norm and weight has something to bound.

    Raises:
        ValueError: naming the keys and the reason.
    """
    settings = config.aggregation
    if config.privacy.site_level_settings is not None:
        for key in ("max_update_norm", "norm_bound_of_median"):
            if getattr(settings, key) is not None:
                raise ValueError(
                    f"aggregation.{key} is set under site-level privacy, where every update is clipped and who is "
                    "rejected would tell of a site; expected none"
                )
    _expect_outvoted(config)
    if settings.max_weight is not None and settings.weights != "examples":
        raise ValueError(
            f"aggregation.max_weight is set for weights {settings.weights!r}, where all count the same; expected "
            "weights 'examples'. Remove it"
        )
    federation = config.federation
    if settings.max_weight is not None and federation.depends_on_time:
        how = "mode 'async'" if federation.mode == "async" else "late 'carry'" if federation.carries else "over_select"
        raise ValueError(
            f"aggregation.max_weight is set with federation.{how}, where fewer sites count than are asked and the "
            "share of one among those that count has no bound; expected weights 'uniform' without max_weight, or "
            "robust 'median', which ignores weights"
        )


def _expect_outvoted(config: RunConfig) -> None:
    """Check that a robust rule has bad sites to hold against, and that they cannot outvote the rest by weight.

    Raises:
        ValueError: naming the keys and the reason.
    """
    settings = config.aggregation
    rule, bad = settings.robust, settings.robust_sites
    if bad == 0 and rule in ("trimmed_mean", "multi_krum"):
        raise ValueError(
            f"aggregation.robust {rule!r} leaves out robust_sites sites, which is 0: it would be the plain mean; "
            "expected at least 1, or robust 'none'"
        )
    share = 1.0 if settings.max_weight is None else settings.max_weight
    if rule in ("norm_clip", "geometric_median") and settings.weights == "examples" and 2 * bad * share >= 1:
        raise ValueError(
            f"aggregation.robust {rule!r} holds while bad sites have less than half of the weight, and under weights "
            f"'examples' {bad} of them can declare {min(1.0, bad * share):.0%} of it; expected weights 'uniform', "
            "robust 'multi_krum', which counts sites, or a max_weight below 1 / (2 robust_sites)"
        )


def method_warnings(config: RunConfig) -> tuple[str, ...]:
    """Return sentences on what is allowed and rarely wise; empty where nothing is."""
    method, kind = method_of(config), config.adapter.kind
    found = []
    both = all(method.trains(f"layer{end}", 1) for end in (A, B))
    if config.privacy.unit != "none" and kind == "lora" and both:
        found.append(
            f"aggregation.method {config.aggregation.method!r} trains A and B under differential privacy: the noise of "
            "both enters their product, and is amplified. ffa_lora and fedsvd train B alone and learn more under noise."
        )
    settings = config.aggregation
    if settings.server_optimizer not in ("none", "fedavgm") and settings.server_lr > _LARGE_SERVER_LR:
        found.append(
            f"aggregation.server_lr {settings.server_lr:g} under {settings.server_optimizer!r} is about what every "
            "entry moves by in a round, and entries of factors are some 0.01. Begin with 0.01."
        )
    if config.aggregation.method == "rolora" and config.federation.rounds == 1:
        found.append(
            "aggregation.method 'rolora' trains A in even rounds and federation.rounds is 1: A stays as it is."
        )
    return tuple(found)


def _named(**properties: bool) -> str:
    """Names of the methods that have these properties."""
    found = (n for n, m in METHODS.items() if all(getattr(m, key) == value for key, value in properties.items()))
    return ", ".join(repr(name) for name in found)
