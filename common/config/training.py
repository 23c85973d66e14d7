"""Config section ``training``: what a site does with a round."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class TrainingConfig(Section):
    """Local optimisation. The optimizer starts afresh every round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter 1711.05101) or SGD with momentum."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the classification head; lr if not given. A new head wants a larger one than factors do,
    above all under DP."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW) or L2 (SGD)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the whole run, towards zero for linear and cosine."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run over which the learning rate rises from zero."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows of a step. Under DP with Poisson sampling it is the expected number."""
    local_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the site's rows in a round; 1 if neither this nor local_steps is given."""
    local_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps in a round, the same at every site."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the norm of a step's gradient (without DP; under DP see privacy.clip_norm)."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """μ of FedProx (Li et al. 1812.06127): how strongly a site is held to what it received; 0 is none. It depends on no
    record, so it costs no privacy."""
    control_variates: bool = False
    """Whether SCAFFOLD (Karimireddy et al. 1910.06378, option II) corrects each site's steps by the difference of the
    federation's mean gradient and its own. Doubles what travels; for plain SGD without privacy."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows computed at once; a step's rows are sorted by length and cut so. auto: at most 64 rows and 1,024 tokens on
    a CPU, 16,384 elsewhere; where rows have to be padded, 4 rows on a CPU, 32 elsewhere."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps are both set; expected one of them")
        if self.momentum > 0 and self.optimizer != "sgd":
            raise ValueError(f"momentum is set for optimizer {self.optimizer!r}; expected 'sgd'")
        return self
