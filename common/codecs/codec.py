"""Codecs: named tensors to the bytes of one message and back. All are safetensors inside; none can run code.

A payload carries the codec's name in the safetensors metadata, so that decoding never guesses.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import WireError
from common.tensors import Manifest, Tensors

_OVERHEAD_BYTES = 1024
"""Header bytes allowed a tensor, on top of its data, before a payload is refused as oversized."""


@dataclass(frozen=True)
class Codec:
    """How one tensor travels.

    Attributes:
        dtype: the dtype on the wire.
        relative_error: bound of |decoded - x| / |x| for normal numbers, 0 for exact.
    """

    dtype: torch.dtype
    relative_error: float

    def pack(self, value: Tensor) -> Tensor:
        """Return the tensor as it travels."""
        return value.detach().to("cpu", self.dtype).contiguous()

    def unpack(self, value: Tensor) -> Tensor:
        """Return the float32 tensor of what arrived."""
        return value.to(torch.float32)


CODECS: dict[str, Codec] = {
    "fp32": Codec(torch.float32, 0.0),
    "bf16": Codec(torch.bfloat16, 2.0**-8),
}

Refuse = Callable[[str, str], Exception]


def _malformed(reason: str, detail: str) -> Exception:
    return WireError(f"payload {detail}; refused as {reason}.")


def encode(tensors: Mapping[str, Tensor], codec: str) -> bytes:
    """Pack tensors with the codec named ``codec``."""
    packed = {name: CODECS[codec].pack(tensors[name]) for name in sorted(tensors)}
    return save(packed, metadata={"codec": codec})


def decode(payload: bytes, manifest: Manifest, codec: str, refuse: Refuse = _malformed) -> Tensors:
    """Unpack a payload that must hold exactly the tensors of ``manifest``, packed with ``codec``.

    The size is checked before anything is parsed, and names, shapes and dtypes against the manifest before any tensor
    is used.

    Args:
        payload: bytes from another process.
        manifest: the expected shape of every tensor by name.
        codec: the expected codec.
        refuse: makes the exception from a reason word and a detail; by default a WireError.

    Returns:
        Float32 tensors.

    Raises:
        WireError: or what ``refuse`` makes, for anything that is not exactly as expected.
    """
    rule = CODECS[codec]
    width = torch.empty(0, dtype=rule.dtype).element_size()
    expected = sum(_count(shape) * width for shape in manifest.values())
    if len(payload) > expected + _OVERHEAD_BYTES * (len(manifest) + 1):
        raise refuse("oversized", f"has {len(payload)} bytes where about {expected} are expected")
    if _codec_name(payload, refuse) != codec:
        raise refuse("codec", f"is not packed with {codec!r}")
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, RuntimeError, KeyError):
        raise refuse("malformed", "is no safetensors file") from None
    if tensors.keys() != manifest.keys():
        extra, missing = (
            sorted(tensors.keys() - manifest.keys()),
            sorted(manifest.keys() - tensors.keys()),
        )
        raise refuse("keys", f"has {len(extra)} unknown tensors and lacks {len(missing)}")
    for name, shape in manifest.items():
        if tuple(tensors[name].shape) != shape:
            raise refuse("shape", f"has shape {tuple(tensors[name].shape)} for {name}; expected {shape}")
        if tensors[name].dtype != rule.dtype:
            raise refuse("dtype", f"has {tensors[name].dtype} for {name}; expected {rule.dtype}")
    return {name: rule.unpack(tensors[name]) for name in manifest}


def _codec_name(payload: bytes, refuse: Refuse) -> str | None:
    """Read the codec's name from the safetensors header: 8 bytes length, then JSON with ``__metadata__``."""
    try:
        (length,) = struct.unpack_from("<Q", payload)
        if length > len(payload) - 8:
            raise ValueError("header longer than the payload")
        metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
        return str(metadata.get("codec"))
    except (ValueError, struct.error, AttributeError, RecursionError):
        raise refuse("malformed", "is no safetensors file") from None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
