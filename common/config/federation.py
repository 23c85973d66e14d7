"""Config sections ``federation``, ``aggregation`` and ``evaluation``: what happens between sites."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section


class FederationConfig(Section):
    """Rounds and the sites that take part in them."""

    rounds: Annotated[int, Field(ge=1)] = 5
    """Rounds of the run."""
    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """Sites sampled for a round; all of them if not given."""
    min_sites: Annotated[int, Field(ge=1)] = 1
    """Sites that must be there at the start, and updates a round needs to count."""
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which a round goes on with the updates it has."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait at the start for min_sites sites."""
    virtual_ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    """Largest rank that each virtual site can hold, in order of their names, from the beginning again where there are
    more sites than ranks. A real site names its own in its site config (max_rank)."""


class AggregationConfig(Section):
    """How updates become the next adapter."""

    method: Literal[
        "fedit", "ffa_lora", "rolora", "fedsa_lora", "flora", "flexlora", "hetlora", "fedex_lora", "lora_fair",
        "fedsvd", "fed_sb",
    ] = "fedit"  # fmt: skip
    """fedit averages A and B apart (2305.05644); ffa_lora freezes A and averages B (2403.12313); rolora trains B in odd
    rounds and A in even ones (2502.01755); fedsa_lora shares A and leaves B at the site (2410.01463); flora stacks
    factors of mixed ranks into a correction to the base (2409.05976); flexlora splits the averaged product anew by SVD
    (2402.11505) and hetlora pads and weighs by norm (2401.06432), both for mixed ranks; fedex_lora corrects the base by
    what averaging loses (2410.09432); lora_fair puts that into B (2411.14961); fedsvd trains B and turns A by SVD
    (2505.12805); fed_sb trains a small core between fixed factors (2502.15436). See docs/aggregation.md."""
    weights: Literal["uniform", "examples"] = "uniform"
    """Weight of a site: the same for all, or its number of rows (refused under DP)."""
    residual_penalty: Annotated[float, Field(gt=0)] = 0.01
    """λ of lora_fair: the larger, the nearer to the plain average of B."""
    robust: Literal["none", "norm_clip", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum"] = "none"
    """What a round's aggregate is instead of the weighted mean, so that bad sites cannot move it far; for linear
    methods. See server/aggregation/robust.py."""
    robust_sites: Annotated[int, Field(ge=0)] = 1
    """Bad sites in a round that the robust rule must hold against."""
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "none"
    """What acts on the aggregated update (Reddi et al. 2003.00295; FedAvgM 1909.06335); none adds it as it is."""
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate η of the server optimizer; the adaptive ones want a small one, such as 0.01."""
    server_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum β₁ of the server optimizer."""
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay β₂ of the second moment of fedadam and fedyogi."""
    server_tau: Annotated[float, Field(gt=0)] = 1e-3
    """Adaptivity τ: what is added to the root of the second moment."""


class EvaluationConfig(Section):
    """When the coordinator evaluates the adapter on the test part."""

    every: Annotated[int, Field(ge=0)] = 1
    """Evaluate after every n-th round and after the last; 0 evaluates before the first and after the last only."""
    enabled: bool = True
    """Whether to evaluate at all."""
    products: bool = True
    """Whether to measure what each aggregation does to the products BA: its error, the sites' cosines, their drift. It
    holds a round's updates in memory until the round ends, also for methods that add them up as they come."""
