"""The messages between coordinator and site: a JSON header, checked by a schema, and a payload of packed tensors.

================  =======================  =======================================
message           coordinator to site      site to coordinator
================  =======================  =======================================
query "describe"  :class:`DescribeRequest` :class:`SiteDescription`
train             :class:`TrainRequest`    :class:`TrainReply`, or :class:`Refusal`
                  and the adapter          and the update
================  =======================  =======================================

Headers refuse unknown fields and wrong types. A site's refusal carries a code and a place in the code, never a text:
texts may quote data.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from common.config.privacy import ClipNorm
from common.config.section import Section
from common.errors import WireError

PROTOCOL = 1
MAX_HEADER_BYTES = 65536
LARGEST_LOSS = 1e6
"""Largest training loss that travels, in nats."""

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("not printable")
    return name


SiteName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]


RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class DescribeRequest(Section):
    """Asks a site whether it can take part in a run."""

    kind: Literal["describe"] = "describe"
    protocol: Literal[1] = 1
    config_digest: Fingerprint


class MechanismReport(Section):
    """What a site does in a round to make its update private."""

    noise_multiplier: Annotated[float, Field(ge=1e-9, le=1e5)]
    sample_rate: Annotated[float, Field(ge=1e-9, le=1)]
    steps: Annotated[int, Field(ge=1, le=10**7)]


class SiteDescription(Section):
    """What a site says of itself before the first round.

    ``num_examples`` is None under differential privacy. Where the sample rate is a batch size over the number of rows,
    the mechanism tells that number all the same: it is taken as public, see the claim. ``seeded`` says that noise and
    sampling follow from a seed, as those of virtual sites do: that protects nothing. ``max_rank`` is the largest rank
    that the site can hold; None where it takes any.
    """

    kind: Literal["description"] = "description"
    protocol: Literal[1] = 1
    site: SiteName
    base_fingerprint: Fingerprint
    initial_fingerprint: Fingerprint
    num_examples: Annotated[int, Field(ge=1, le=10**9)] | None
    mechanism: MechanismReport | None
    seeded: bool
    max_rank: Annotated[int, Field(ge=1)] | None = None


class TrainRequest(Section):
    """Asks a site to train from the adapter in the payload.

    ``run`` names the run at the sites' ledgers and stays the same when it is resumed. ``clip_norm`` is where adaptive
    clipping goes on; None before the first round and without adaptive clipping. ``fixed_ranks`` are the ranks of the
    correction to the base, of each layer in order of name, 0 where a layer has none; empty without any.
    ``variates_taken`` is the last round whose change of the site's control variate the coordinator has, 0 for none;
    None without control variates. ``mechanism`` and ``rank`` are what the site told of itself: one that would do
    otherwise by now, with other rows or another ``max_rank``, answers :data:`CHANGED` and spends nothing.
    """

    kind: Literal["train"] = "train"
    protocol: Literal[1] = 1
    config_digest: Fingerprint
    run: RunId
    round: Annotated[int, Field(ge=1)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    base_fingerprint: Fingerprint
    clip_norm: ClipNorm | None = None
    variates_taken: Annotated[int, Field(ge=0)] | None = None
    fixed_ranks: tuple[Annotated[int, Field(ge=0, le=65536)], ...] = Field(default=(), strict=False, max_length=4096)
    mechanism: MechanismReport | None = None
    rank: Annotated[int, Field(ge=1)] | None = None


class TrainReply(Section):
    """A site's answer to a :class:`TrainRequest`, with the update in the payload.

    ``train_loss`` is None under differential privacy, or noisy and charged with ``privacy.release_loss``.
    ``clip_norm`` is where adaptive clipping ended, which follows from noisy counts.
    """

    kind: Literal["update"] = "update"
    protocol: Literal[1] = 1
    site: SiteName
    round: Annotated[int, Field(ge=1)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    base_fingerprint: Fingerprint
    steps: Annotated[int, Field(ge=0, le=10**7)]
    train_loss: Annotated[float, Field(ge=-LARGEST_LOSS, le=LARGEST_LOSS)] | None
    mechanism: MechanismReport | None
    clip_norm: ClipNorm | None = None


CHANGED = "changed"
"""Code of a refusal: the site is no longer as it described itself; asked to describe itself again, it will."""


class Refusal(Section):
    """A site's "no": the code of the error and where in fedtune's code it arose."""

    kind: Literal["refusal"] = "refusal"
    protocol: Literal[1] = 1
    code: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    place: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:-]{0,96}$")]


Header = TypeVar("Header", bound=Section)


def header_bytes(header: Section) -> bytes:
    """Return the header as it travels."""
    return header.model_dump_json().encode()


def parse_header(data: bytes, kind: type[Header]) -> Header | Refusal:
    """Check a header that came from another process.

    Returns:
        A header of ``kind``, or a :class:`Refusal`.

    Raises:
        WireError: for anything else.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise WireError(f"header has {len(data)} bytes; expected at most {MAX_HEADER_BYTES}.")
    try:
        return Refusal.model_validate_json(data)
    except ValidationError:
        pass
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"])
        raise WireError(f"header is no valid {kind.__name__} ({where[:60]}); expected protocol {PROTOCOL}.") from None
