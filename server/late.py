"""Updates that come after their round: the request that each answers, and how much it still counts.

An update that was asked for in round r and arrives in round t has staleness s = t - r and is multiplied by (1 + s)^-a
(polynomial staleness: FedAsync, Xie et al. 1903.03934, section 5; a = 1/2 in FedBuff, Nguyen et al. 2106.06639). It is
the update that is damped and not its weight,

    Δ = Σ w (1 + s)^-a u / Σ w,

as in FedBuff: a buffer of old updates moves the adapter less, and not as far in old directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from common.tensors import Manifest, Tensors
from common.wire import TrainRequest
from server.cohort import Member
from server.outcome import Outcome


@dataclass(frozen=True)
class Asked:
    """A request to a site, and what its answer is checked against, in whichever round it comes.

    Attributes:
        member: the site.
        request: the header of the request.
        manifest: the shapes of the update.
        bytes_down: bytes of the request.
    """

    member: Member
    request: TrainRequest
    manifest: Manifest
    bytes_down: int

    def charge(self) -> dict[str, Any]:
        """Return what the site was sent and is charged for, as entries of its outcome."""
        mechanism = self.member.description.mechanism
        return {"bytes_down": self.bytes_down, "mechanism": mechanism.model_dump() if mechanism else None}


@dataclass(frozen=True)
class Carried:
    """What became of an update of an earlier round, or of a request of this one that was repeated.

    Attributes:
        site: whose.
        round: in which it was asked for.
        staleness: s, in rounds; 0 for a request of this one.
        outcome: what became of it.
    """

    site: str
    round: int
    staleness: int
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``metrics.jsonl``."""
        return {"site": self.site, "round": self.round, "staleness": self.staleness, **asdict(self.outcome)}


def damped(update: Mapping[str, Tensor], staleness: int, exponent: float) -> Tensors:
    """Return the update times (1 + s)^-a; the same bits for s = 0."""
    if staleness == 0:
        return dict(update)
    factor = (1.0 + staleness) ** -exponent
    return {name: (value.double() * factor).float() for name, value in update.items()}
