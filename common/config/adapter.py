"""Config section ``adapter``: what is trained on top of the base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section


class AdapterConfig(Section):
    """LoRA factors on linear layers (Hu et al. 2106.09685) and, where the task has one, the head."""

    kind: Literal["lora", "head_only"] = "lora"
    """head_only trains the classification head on frozen features, a strong baseline under DP."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank r of the factors A [r, n] and B [m, r]."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product BA is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A. Dropout inside the frozen base is always off."""
    target_modules: Literal["auto", "all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (
        "auto"
    )
    """Names of the layers that get factors; auto is query and value (or the family's like)."""
