"""Config sections ``federation``, ``aggregation``, ``communication`` and ``evaluation``: what happens between sites."""

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


class AggregationConfig(Section):
    """How updates become the next adapter."""

    method: Literal["fedit", "ffa_lora"] = "fedit"
    """fedit averages A and B apart (2305.05644); ffa_lora freezes A and averages B (2403.12313)."""
    weights: Literal["uniform", "examples"] = "uniform"
    """Weight of a site: the same for all, or its number of rows (refused under DP)."""


class CommunicationConfig(Section):
    """How tensors are packed for the wire."""

    codec: Literal["fp32", "bf16"] = "fp32"
    """fp32 is exact; bf16 halves the bytes and rounds to 8 bits of mantissa."""


class EvaluationConfig(Section):
    """When the coordinator evaluates the adapter on the test part."""

    every: Annotated[int, Field(ge=0)] = 1
    """Evaluate after every n-th round and after the last; 0 evaluates before the first and after the last only."""
    enabled: bool = True
    """Whether to evaluate at all."""
