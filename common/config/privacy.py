"""Config section ``privacy``: what is guaranteed, for whom. Left out, the safe default applies: DP per example."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class PrivacyConfig(Section):
    """The privacy unit and the budget of one run at one site."""

    unit: Literal["none", "example"] = "example"
    """example: DP-SGD at each site protects single records; none: no guarantee at all."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """ε that the whole run may spend at a site; 8 if neither this nor noise_multiplier is given."""
    delta: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    """δ of the guarantee; well below one over the number of records."""
    noise_multiplier: Annotated[float, Field(ge=1e-9, le=1e5)] | None = None
    """Standard deviation of the noise in units of clip_norm, in place of epsilon."""
    clip_norm: Annotated[float, Field(gt=0)] = 0.1
    """L2 norm C that each example's gradient is clipped to (Abadi et al. 1607.00133)."""
    sample_rate: Annotated[float, Field(ge=1e-9, le=1)] | None = None
    """Probability q that a record is in a step, the same at every site; without it, batch_size over the site's rows."""
    accountant: Literal["prv", "rdp"] = "prv"
    """prv (Gopi et al. 2106.02848) is tight; rdp (Mironov 1702.07476) is faster and looser."""

    @model_validator(mode="after")
    def _one_target(self) -> PrivacyConfig:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("epsilon and noise_multiplier are both set; expected one of them")
        return self

    @property
    def target_epsilon(self) -> float | None:
        """The ε to plan for, or None where the noise multiplier is given."""
        if self.noise_multiplier is not None:
            return None
        return 8.0 if self.epsilon is None else self.epsilon
