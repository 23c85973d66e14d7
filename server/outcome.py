"""What became of a site in a round, as the round's record tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Outcome:
    """What became of one site in one round.

    Attributes:
        status: "admitted", "rejected", "failed" (the node or Flower reported an error), "late", "spare" (the round had
            its updates before this one), or "dropped" (it was usable, and the round was skipped).
        reason: why it does not count.
        bytes_down: bytes of the request, header and payload.
        bytes_up: bytes of the reply.
        steps: local steps.
        weight: in the average, relative to the largest that any site declared.
        update_norm: L2 norm of the update as it arrived; withheld under site-level privacy.
        train_loss: None under differential privacy, unless it is released and charged.
        mechanism: noise multiplier, sample rate and steps that the site's ledger is charged for having been asked;
            None where an update of an earlier round came late, since it was told with that round.
    """

    status: str
    reason: str | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    steps: int = 0
    weight: float = 0.0
    update_norm: float | None = None
    train_loss: float | None = None
    mechanism: dict[str, float] | None = None


def bytes_passed(record: Mapping[str, Any], key: Literal["bytes_up", "bytes_down"]) -> int:
    """Return the bytes of all sites in a round's record, those of answers to earlier rounds included."""
    return int(sum(outcome[key] for outcome in (*record["sites"].values(), *record.get("carried", ()))))
