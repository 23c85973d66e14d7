"""Config section ``adapter``: what is trained on top of the base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class AdapterConfig(Section):
    """What is trained: LoRA factors (Hu et al. 2106.09685) or a prompt and, where the task has one, the head."""

    kind: Literal["lora", "prompt", "head_only"] = "lora"
    """lora: factors on linear layers; prompt: virtual tokens before every text (Lester et al. 2104.08691); head_only:
    the classification head on frozen features, a strong baseline under DP."""
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 8
    """Length of the prompt, for kind prompt."""
    rank: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rank r of the factors A [r, n] and B [m, r]. What is exported may have more: see docs/aggregation.md."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product BA is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A. Dropout inside the frozen base is always off."""
    target_modules: Literal["auto", "all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (
        "auto"
    )
    """Names of the layers that get factors; auto is query and value (or the family's like)."""

    @model_validator(mode="after")
    def _prompt_has_no_layers(self) -> AdapterConfig:
        if self.kind == "prompt" and (self.target_modules != "auto" or self.dropout > 0):
            key = "dropout" if self.dropout > 0 else "target_modules"
            raise ValueError(f"{key} is set for kind 'prompt', which puts nothing on layers; remove it")
        return self
