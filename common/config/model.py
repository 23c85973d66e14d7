"""Config section ``model``: the frozen base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section
from common.sources import is_hub


class ModelConfig(Section):
    """Which base model, and in what precision it is held."""

    source: Annotated[str, Field(min_length=1)]
    """A folder, ``package:NAME/folder`` or ``hub:owner/name``; weights must be safetensors."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of the hub repository (40 hexadecimal digits); needed for a hub source, refused otherwise."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the base: auto is bf16 on CUDA devices that have it, else fp32. The adapter is held and computed in
    fp32 always."""
    quantization: Literal["none", "4bit"] = "none"
    """4bit holds the base in NF4 through bitsandbytes; needs CUDA."""
    pooling: Literal["family", "mean"] = "family"
    """How an encoder's states become the input of a classification head. family: as transformers' classifier of that
    family does; mean: their mean over the tokens, for sentence encoders that were trained so (Reimers and Gurevych
    1908.10084), with a new linear head. BERT, RoBERTa, XLM-RoBERTa and DistilBERT only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _revision_goes_with_hub(self) -> ModelConfig:
        if is_hub(self.source) and self.revision is None:
            raise ValueError("revision is missing; expected the 40-digit commit of the hub repository")
        if not is_hub(self.source) and self.revision is not None:
            raise ValueError("revision is set but source is not a hub id; remove it")
        return self
