"""The run config: what is trained, how, with which guarantee. It travels unchanged to every site."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import Field, model_validator

from common.config.adapter import AdapterConfig
from common.config.communication import CommunicationConfig, expect_communication
from common.config.data import DataConfig
from common.config.federation import AggregationConfig, EvaluationConfig, FederationConfig
from common.config.method_rules import expect_method
from common.config.model import ModelConfig
from common.config.privacy import PrivacyConfig
from common.config.round_rules import expect_rounds
from common.config.section import Section
from common.config.simulation import SimulationConfig
from common.config.training import TrainingConfig
from common.config.variate_rules import expect_control_variates


class RunConfig(Section):
    """One experiment. Every key has a default except the base model, the task and the training data."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    """Name of the run and of its folder: letters, digits, dot, dash, underscore."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every repeatable choice. Noise at a real site never comes from it."""
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    communication: CommunicationConfig = CommunicationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    simulation: SimulationConfig | None = None
    """Faults and time in fedtune-sim; refused everywhere else."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.privacy.unit != "none" and self.aggregation.weights == "examples":
            raise ValueError(
                "aggregation.weights 'examples' would release exact row counts under DP; expected 'uniform'"
            )
        if self.privacy.is_local and self.training.max_grad_norm is not None:
            raise ValueError("training.max_grad_norm is set under DP; expected privacy.clip_norm instead. Remove it")
        if self.privacy.unit == "user" and self.data.person_field is None:
            raise ValueError("privacy.unit 'user' needs data.person_field; expected the field that names the person")
        if self.adapter.kind == "head_only" and self.data.task != "classification":
            raise ValueError("adapter.kind 'head_only' needs a head; expected data.task 'classification'")
        expect_method(self)
        expect_communication(self)
        expect_rounds(self)
        expect_control_variates(self)
        if self.federation.sites_per_round is not None and (
            self.federation.sites_per_round < self.federation.min_sites
        ):
            raise ValueError(
                f"federation.sites_per_round {self.federation.sites_per_round} is below min_sites "
                f"{self.federation.min_sites}; expected at least as many"
            )
        return self

    def digest(self) -> str:
        """SHA-256 of the config in canonical JSON: two runs with the same digest do the same work."""
        values = self.model_dump(mode="json", exclude={"simulation"} if self.simulation is None else None)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
