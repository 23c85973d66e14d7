"""Section ``policy`` of the site config: the site's own rules, which a run can only be stricter than."""

from __future__ import annotations

from datetime import time
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section
from common.wire import Fingerprint

_HOURS = r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$"

Task = Literal["classification", "causal_lm"]
AdapterKind = Literal["lora", "prompt", "head_only"]
Metric = Literal["train_loss", "clip_norm"]


class BaseModelRule(Section):
    """A base model that may be trained on the site's data."""

    sha256: Fingerprint
    """SHA-256 of its weights, as fedtune-client check prints it. The site's own model must have it."""
    id: Annotated[str, Field(min_length=1)] | None = None
    """What the run must call it (model.source); any name if not given, since the site's own model is trained anyway."""


class Policy(Section):
    """What a run may ask of the site. The safe side where a default could matter; the budget stands beside it."""

    base_models: tuple[BaseModelRule, ...] = Field(default=(), strict=False)
    """Base models that may be trained; with none, the site's own as it is."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, strict=False)] = ("classification", "causal_lm")
    """Tasks that a run may have."""
    adapters: Annotated[tuple[AdapterKind, ...], Field(min_length=1, strict=False)] = ("lora", "prompt", "head_only")
    """Kinds of adapter that may be trained."""
    methods: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """Aggregation methods that a run may use; any if not given."""
    largest_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest adapter.rank that a run may have (max_rank, beside, is what the device holds: the run goes on below)."""
    largest_virtual_tokens: Annotated[int, Field(ge=1)] | None = None
    """Largest adapter.virtual_tokens."""
    largest_parameters: Annotated[int, Field(ge=1)] | None = None
    """Most numbers that a run may train: layers (target_modules) and rank together."""
    least_noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Least noise multiplier of a run, given or planned from its ε."""
    epsilon_per_run: Annotated[float, Field(gt=0)] | None = None
    """Largest ε of one run, all its rounds together, at the budget's δ and for the budget's unit."""
    largest_delta: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Largest δ that a run may plan with. What is spent is counted at the budget's δ all the same."""
    largest_rounds: Annotated[int, Field(ge=1)] = 1000
    """Most rounds of a run."""
    largest_steps_per_round: Annotated[int, Field(ge=1)] = 100_000
    """Most steps of a round."""
    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = ()
    """What may leave besides the update, noised and charged: train_loss (privacy.release_loss), clip_norm (clipping
    'adaptive'). Nothing by default."""
    hours: Annotated[str, Field(pattern=_HOURS)] | None = None
    """Hours of the day, on the site's clock, in which messages are answered: 20:00-06:00; always if not given."""
    pause: bool = False
    """Answer nothing until this is false again. A round that is training ends first."""

    @model_validator(mode="after")
    def _open_at_some_time(self) -> Policy:
        if self.hours is not None and self.span[0] == self.span[1]:
            raise ValueError(f"hours {self.hours!r} begin as they end; expected two times, such as 20:00-06:00")
        return self

    @property
    def span(self) -> tuple[time, time]:
        """First and last of ``hours``; the whole day without."""
        if self.hours is None:
            return time.min, time.max
        begin, end = self.hours.split("-")
        return time.fromisoformat(begin), time.fromisoformat(end)
