"""Config section ``communication``: how tensors are packed for the wire, and what that goes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from common.config.section import Section
from common.methods import METHODS, method_of

if TYPE_CHECKING:
    from common.config.run import RunConfig

CodecName = Literal["fp32", "bf16", "int8", "int4"]


class CommunicationConfig(Section):
    """How tensors are packed for the wire. See docs/codecs.md for what each costs and saves."""

    codec: CodecName = "fp32"
    """Of updates: fp32 is exact; bf16 halves the bytes and rounds to 8 bits of mantissa; int8 (a quarter) and int4 (an
    eighth) scale each block of entries and round at random, so that the expected value is exact."""
    down: CodecName | None = None
    """Of the adapter on its way to the sites; if not given as codec, but int8 where that is int4."""
    block: Annotated[int, Field(ge=8, le=4096)] = 64
    """Entries that share a scale under int8 and int4."""
    top_k: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of an update's entries that is sent, the largest of each tensor; the site adds what it left out to its next
    update (error feedback). All are sent if not given."""
    zstd: Annotated[int, Field(ge=0, le=19)] = 0
    """Level at which whole payloads are compressed besides, both ways; 0 for not at all."""

    @property
    def down_codec(self) -> CodecName:
        """Codec of the adapter on its way to the sites."""
        if self.down is not None:
            return self.down
        return "int8" if self.codec == "int4" else self.codec


def expect_communication(config: RunConfig) -> None:
    """Check that what is sent makes sense with the rest of the run config.

    Raises:
        ValueError: naming the two keys and the reason.
    """
    share, robust = config.communication.top_k, config.aggregation.robust
    if share is None:
        return
    if config.privacy.unit != "none":
        raise ValueError(
            f"communication.top_k {share:g} is set under privacy.unit {config.privacy.unit!r}: what it leaves out "
            "comes in a later round, which the accounting of that round does not cover, and the largest entries of a "
            "noised update are mostly noise; expected no top_k, or privacy.unit 'none'. int8 and int4 go with any unit"
        )
    if not method_of(config).optimizable:
        able = ", ".join(repr(name) for name, method in METHODS.items() if method.optimizable)
        raise ValueError(
            f"communication.top_k {share:g} adds what it left out to a later update, which needs the same coordinates "
            f"every round, and aggregation.method {config.aggregation.method!r} changes them; expected one of {able}"
        )
    if robust in ("median", "trimmed_mean"):
        raise ValueError(
            f"communication.top_k {share:g} leaves most entries of an update zero, and so does aggregation.robust "
            f"{robust!r}, which takes each entry alone; expected another rule, or 'none'"
        )
