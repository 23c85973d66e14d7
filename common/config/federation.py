"""Config sections ``federation``, ``aggregation`` and ``evaluation``: what happens between sites."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class FederationConfig(Section):
    """Rounds and the sites that take part in them."""

    mode: Literal["sync", "async"] = "sync"
    """sync: a round asks its sites and waits for them; async: the adapter moves with every buffer_size updates, and
    sites are asked again as they answer (FedBuff, Nguyen et al. 2106.06639). A round is then what lies between two
    moves, sites_per_round the most sites at work at once, and a site is asked at most once in a round."""
    rounds: Annotated[int, Field(ge=1)] = 5
    """Rounds of the run."""
    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """Sites sampled for a round; all of them if not given."""
    over_select: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Ask so many times sites_per_round sites, rounded up, and close the round at sites_per_round admitted updates: the
    slowest cost no time. They train and spend their budgets all the same."""
    buffer_size: Annotated[int, Field(ge=1)] | None = None
    """Updates that move the adapter, for mode async."""
    min_sites: Annotated[int, Field(ge=1)] = 1
    """Sites that must be there at the start, and updates a round needs to count."""
    round_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds from its requests after which a round goes on with the updates it has."""
    below_min: Literal["stop", "extend", "skip"] = "stop"
    """A round with fewer updates than it needs: stop ends the run, where the checkpoint stands; extend waits once more,
    for extension_s, in which it asks those that failed or refused again, then stops; skip leaves the adapter as it is,
    drops what came, and goes on with the next round after a pause that grows from 10 s up to the round's deadline."""
    extension_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a round below its minimum waits longer, for below_min extend."""
    late: Literal["drop", "carry"] = "drop"
    """An update that comes after its round: drop it, or carry it into the round that is on, where it counts less. A
    site that owes an update is asked nothing else. Mode async always carries."""
    max_staleness: Annotated[int, Field(ge=1, le=16)] = 8
    """Rounds after which a late update counts no more; its site is asked again when round_timeout_s is over too."""
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    """a of the factor (1 + s)^-a on an update that is s rounds late (FedAsync 1903.03934; 1/2 in FedBuff)."""
    join_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait at the start for min_sites sites."""
    virtual_ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    """Largest rank that each virtual site can hold, in order of their names, from the beginning again where there are
    more sites than ranks. A real site names its own in its site config (max_rank)."""

    @property
    def carries(self) -> bool:
        """Whether updates that come after their round still count."""
        return self.late == "carry" or self.mode == "async"

    @property
    def depends_on_time(self) -> bool:
        """Whether the order of arrival, and not just the deadline, decides what counts in which round."""
        return self.carries or self.over_select > 1

    @model_validator(mode="after")
    def _rounds_can_close(self) -> FederationConfig:
        sites, buffer = self.sites_per_round, self.buffer_size
        if (self.mode == "async") != (buffer is not None):
            raise ValueError("buffer_size goes with mode 'async'; expected both or neither")
        if buffer is not None and buffer > (sites or buffer):
            raise ValueError(f"buffer_size {buffer} is above sites_per_round {sites}; expected at most as many")
        if buffer is not None and buffer < self.min_sites:
            raise ValueError(f"buffer_size {buffer} is below min_sites {self.min_sites}; expected at least as many")
        if self.over_select > 1 and self.mode == "async":
            raise ValueError("over_select is set for mode 'async', which waits for no slow site; remove it")
        if self.over_select > 1 and sites is None:
            raise ValueError("over_select is set but all sites are asked; expected sites_per_round. Set it")
        return self


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
    """What a round's aggregate is instead of the weighted mean, so that bad sites cannot move it far: krum, multi_krum
    and geometric_median for every method, the others for linear ones. See server/aggregation/robust.py."""
    robust_sites: Annotated[int, Field(ge=0)] = 1
    """Bad sites in a round that the robust rule must hold against."""
    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of an update as it is sent, all tensors together; a longer one is rejected."""
    norm_bound_of_median: Annotated[float, Field(ge=1)] | None = None
    """Reject updates longer than so many times the median norm of the round's. It holds a round's updates in memory
    until the round ends, also for methods that add them up as they come."""
    max_weight: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share that one site's weight can have among those of the sites asked, for weights examples: larger
    declarations are cut to it. What sites are late with, or have rejected, raises the shares of the others beyond it.
    Refused with late carry, mode async and over_select, where fewer count than are asked in any round."""
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
