"""How one direction of a run is packed: which codec, how much of it, and what is put around it.

=======  ================  ==================  ==============================================
codec    on the wire       bytes an entry      error of an entry x
=======  ================  ==================  ==============================================
fp32     float32           4                   none
bf16     bfloat16          2                   2^-8 |x|
int8     int8, and scales  1 + 2 / block       the scale of its block, 0 on average over draws
int4     uint8, and scales 1/2 + 2 / block     the same
=======  ================  ==================  ==============================================

Any of them packs the whole tensor or, with ``top_k``, its largest entries beside their places; zstd goes around it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config.communication import CommunicationConfig


@dataclass(frozen=True)
class Codec:
    """How an entry travels.

    Attributes:
        dtype: on the wire.
        bits: of an entry's code under stochastic rounding by block; None where entries are cast to ``dtype``.
        relative_error: bound of |decoded - x| / |x| of a cast, for normal numbers; 0 for exact, or for codes, whose
            bound is their scale.
    """

    dtype: torch.dtype
    bits: int | None = None
    relative_error: float = 0.0


CODECS: dict[str, Codec] = {
    "fp32": Codec(torch.float32),
    "bf16": Codec(torch.bfloat16, relative_error=2.0**-8),
    "int8": Codec(torch.int8, bits=8),
    "int4": Codec(torch.uint8, bits=4),
}


@dataclass(frozen=True)
class Packing:
    """How tensors are packed.

    Attributes:
        codec: key of :data:`CODECS`.
        block: entries that share a scale.
        top_k: share of each tensor's entries that travels; None for all.
        zstd: level of the compression around it; 0 for none.
    """

    codec: str
    block: int = 64
    top_k: float | None = None
    zstd: int = 0

    @classmethod
    def of_update(cls, communication: CommunicationConfig) -> Packing:
        """Return how updates are packed."""
        return cls(communication.codec, communication.block, communication.top_k, communication.zstd)

    @classmethod
    def of_adapter(cls, communication: CommunicationConfig) -> Packing:
        """Return how the adapter, with a correction to the base, is packed on its way to the sites."""
        return cls(communication.down_codec, communication.block, None, communication.zstd)

    @property
    def rule(self) -> Codec:
        """How an entry travels."""
        return CODECS[self.codec]

    @property
    def plain(self) -> bool:
        """Whether tensors travel whole and in their own shape; else flat, with their shapes told beside them."""
        return self.rule.bits is None and self.top_k is None

    @property
    def tag(self) -> str:
        """What a payload says of itself, for instance ``int8/64`` or ``bf16+top0.1``."""
        blocks = f"/{self.block}" if self.rule.bits else ""
        share = "" if self.top_k is None else f"+top{self.top_k:g}"
        return self.codec + blocks + share
