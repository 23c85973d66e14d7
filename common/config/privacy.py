"""Config section ``privacy``: what is guaranteed, for whom. Left out, the safe default applies: DP per example."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section

Unit = Literal["none", "example", "user", "site"]
LOCAL_UNITS: tuple[Unit, ...] = ("example", "user")
"""Units that are protected at the site, before anything leaves it."""

Epsilon = Annotated[float, Field(gt=0, le=1000)]
Delta = Annotated[float, Field(gt=0, lt=0.5)]
Noise = Annotated[float, Field(ge=1e-9, le=1e5)]
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-8, 1e8
ClipNorm = Annotated[float, Field(ge=SMALLEST_CLIP_NORM, le=LARGEST_CLIP_NORM)]
DEFAULT_EPSILON = 8.0
_LARGEST_SHARES = 0.9


class SiteLevelConfig(Section):
    """Site-level differential privacy at the coordinator, beside a unit that the sites protect themselves."""

    epsilon: Epsilon | None = None
    """ε that the whole run may spend on a site; 8 if neither this nor noise_multiplier is given."""
    delta: Delta = 1e-3
    """δ of the site-level guarantee; below one over the number of sites."""
    noise_multiplier: Noise | None = None
    """Standard deviation of the noise on the sum of updates in units of clip_norm, in place of epsilon."""
    clip_norm: ClipNorm = 0.1
    """L2 norm that each site's update is clipped to on arrival."""
    accountant: Literal["prv", "rdp"] = "prv"
    """See privacy.accountant."""

    @model_validator(mode="after")
    def _one_target(self) -> SiteLevelConfig:
        _refuse_two_targets(self.epsilon, self.noise_multiplier)
        return self

    @property
    def target_epsilon(self) -> float | None:
        """The ε to plan for, or None where the noise multiplier is given."""
        return _target(self.epsilon, self.noise_multiplier)


class PrivacyConfig(Section):
    """The privacy unit and the budget of one run."""

    unit: Unit = "example"
    """example: each site protects single records by DP-SGD; user: each site protects persons, all their records
    together; site: the coordinator clips updates and adds noise, which protects a site as a whole against whoever gets
    the adapter, and trusts the coordinator; none: no guarantee at all."""
    epsilon: Epsilon | None = None
    """ε that the whole run may spend; 8 if neither this nor noise_multiplier is given."""
    delta: Delta = 1e-5
    """δ of the guarantee; well below one over the number of records, persons or sites that are protected."""
    noise_multiplier: Noise | None = None
    """Standard deviation of the noise in units of clip_norm, in place of epsilon. With quantile_share or loss_share it
    is that of the whole mechanism, as accounted; the gradient gets a little more noise."""
    clip_norm: ClipNorm = 0.1
    """L2 norm C that the gradient of each example or person is clipped to (Abadi et al. 1607.00133), or, for unit
    site, that each update is clipped to. With clipping adaptive it is where C starts."""
    clipping: Literal["flat", "per_layer", "adaptive"] = "flat"
    """flat clips the whole gradient to C; per_layer clips the part of each of the L trained layers to C / √L;
    adaptive moves C towards a quantile of the gradient norms (Andrew et al. 1905.03871)."""
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of gradients that adaptive clipping wants to leave unclipped."""
    clip_lr: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Rate of adaptive clipping: C is multiplied by exp(-clip_lr (share below C - clip_quantile)) after every step."""
    quantile_share: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the privacy loss (of 1 / noise_multiplier²) that adaptive clipping's noisy count takes."""
    release_loss: bool = False
    """Whether a site may tell its training loss, through the Gaussian mechanism and charged; else it is withheld."""
    loss_share: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the privacy loss that the released loss takes."""
    loss_bound: Annotated[float, Field(ge=1e-3, le=1e3)] = 4.0
    """Nats that one example's or person's loss is cut to before it is added up for release."""
    sample_rate: Annotated[float, Field(ge=1e-9, le=1)] | None = None
    """Probability q that a record (or person) is in a step, the same at every site; without it batch_size over the
    site's number of them, or as much less as makes a round's passes whole."""
    accountant: Literal["prv", "rdp"] = "prv"
    """prv (Gopi et al. 2106.02848) is tight; rdp (Mironov 1702.07476) is faster and looser."""
    site_level: SiteLevelConfig | None = None
    """Site-level privacy on top of unit example or user: a second guarantee, of its own unit and trust."""

    @model_validator(mode="after")
    def _sound(self) -> PrivacyConfig:
        _refuse_two_targets(self.epsilon, self.noise_multiplier)
        if not self.is_local:
            local_only = {
                "sample_rate": self.sample_rate is not None,
                "clipping": self.clipping != "flat",
                "release_loss": self.release_loss,
                "site_level": self.site_level is not None,
            }
            for key, used in local_only.items():
                if used:
                    raise ValueError(f"{key} is set but unit is {self.unit!r}; expected unit 'example' or 'user'")
        if self.site_level is not None and self.clipping == "adaptive":
            raise ValueError(
                "clipping 'adaptive' tells every site where the others' clip norms ended, which site_level does not "
                "cover; expected 'flat' or 'per_layer' with it"
            )
        if self.used_quantile_share + self.used_loss_share > _LARGEST_SHARES:
            raise ValueError(
                f"quantile_share and loss_share take {self.used_quantile_share + self.used_loss_share:g} of the "
                f"privacy loss; expected at most {_LARGEST_SHARES:g} together"
            )
        return self

    @property
    def used_quantile_share(self) -> float:
        """``quantile_share`` where clipping is adaptive, else 0."""
        return self.quantile_share if self.clipping == "adaptive" else 0.0

    @property
    def used_loss_share(self) -> float:
        """``loss_share`` where the loss is released, else 0."""
        return self.loss_share if self.release_loss else 0.0

    @property
    def is_local(self) -> bool:
        """Whether sites make their updates private before these leave."""
        return self.unit in LOCAL_UNITS

    @property
    def target_epsilon(self) -> float | None:
        """The ε to plan for, or None where the noise multiplier is given."""
        return _target(self.epsilon, self.noise_multiplier)

    @property
    def site_level_settings(self) -> SiteLevelConfig | None:
        """What the coordinator does to protect whole sites, or None: from unit 'site', or from ``site_level``."""
        if self.unit != "site":
            return self.site_level
        return SiteLevelConfig(
            epsilon=self.epsilon, delta=self.delta, noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm, accountant=self.accountant,
        )  # fmt: skip


def _refuse_two_targets(epsilon: float | None, noise_multiplier: float | None) -> None:
    if epsilon is not None and noise_multiplier is not None:
        raise ValueError("epsilon and noise_multiplier are both set; expected one of them")


def _target(epsilon: float | None, noise_multiplier: float | None) -> float | None:
    if noise_multiplier is not None:
        return None
    return DEFAULT_EPSILON if epsilon is None else epsilon
