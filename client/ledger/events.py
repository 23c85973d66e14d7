"""The events of a ledger, as they are written: each one a checked record in canonical JSON.

==========  ====================================================================================
opened      the file was made; holds the digest of its key
dataset     a set of rows was seen for the first time, and which earlier sets share a row with it
reserved    a round may be trained; from here on it counts as spent
committed   the bytes that are released for it, which are the only ones that ever will be
==========  ====================================================================================
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from common.config.section import Section

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


class Charge(Section):
    """What a round spends: steps of the Poisson-sampled Gaussian mechanism, and whom they protect."""

    unit: Literal["example", "user"]
    """What one unit of sampling and clipping is: a record, or a person with all records."""
    noise_multiplier: Annotated[float, Field(gt=0)]
    """σ: standard deviation of the noise over the clip norm, of the whole mechanism."""
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """q: probability that a unit is in a step."""
    steps: Annotated[int, Field(ge=1)]
    """Steps of the round."""


class Opened(Section):
    """The ledger was made."""

    key_digest: Digest
    time: Time


class DatasetSeen(Section):
    """Rows that a round was asked of for the first time."""

    source: str
    """Where the rows were read from, for people."""
    fingerprint: Digest
    """SHA-256 over the rows, whatever their order."""
    num_rows: Annotated[int, Field(ge=1)]
    members: Digest
    """SHA-256 over the keyed digests of its records and persons."""
    shares: tuple[int, ...]
    """Events of the earlier datasets that have a record or person in common with this one."""
    time: Time


class Reserved(Section):
    """A round that may be trained, and counts as spent."""

    run: RunId
    round: Annotated[int, Field(ge=1)]
    request: Digest
    """SHA-256 of what was asked: a repeat must ask the same."""
    dataset: Annotated[int, Field(ge=1)]
    """Event of the dataset."""
    charge: Charge
    time: Time


class Committed(Section):
    """The one release of a reserved round."""

    run: RunId
    round: Annotated[int, Field(ge=1)]
    payload: Digest
    size_bytes: Annotated[int, Field(ge=0)]
    time: Time


Event = Opened | DatasetSeen | Reserved | Committed

EVENTS: dict[str, type[Event]] = {
    "opened": Opened,
    "dataset": DatasetSeen,
    "reserved": Reserved,
    "committed": Committed,
}


def kind_of(event: Event) -> str:
    """Return the name that an event is stored under."""
    return next(kind for kind, known in EVENTS.items() if type(event) is known)


def to_body(event: Event) -> str:
    """Return an event as canonical JSON: sorted keys, no spaces, floats to the last bit."""
    return json.dumps(event.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def from_body(kind: str, body: str) -> Event | None:
    """Read an event back; None for what :func:`to_body` did not write."""
    if kind not in EVENTS:
        return None
    try:
        return EVENTS[kind].model_validate_json(body)
    except ValidationError:
        return None


def now() -> str:
    """Return the time as events hold it: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
