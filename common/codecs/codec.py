"""Codecs: named tensors to the bytes of one message and back. All are safetensors inside; none can run code.

A payload carries the tag of its packing in the safetensors metadata, so that decoding never guesses; see
:mod:`common.codecs.layout` for what else is in it. Everything about it is checked before a value of it is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.codecs.blocks import (
    SMALLEST_SCALE,
    block_scales,
    dequantise,
    error_bound,
    levels,
    num_blocks,
    pack_nibbles,
    quantise,
    unpack_nibbles,
)
from common.codecs.compression import compress, decompress
from common.codecs.layout import (
    PLACES,
    SCALES,
    metadata_of,
    num_sent,
    places_as,
    shapes_of,
    shapes_text,
    wire_bytes,
    wire_of,
)
from common.codecs.packing import Packing
from common.codecs.refusal import Refuse, wire_error
from common.codecs.sparse import are_places, largest_places, num_kept, spread
from common.tensors import Manifest, Tensors, manifest_of

_OVERHEAD_BYTES = 1024
"""Header bytes allowed a tensor, on top of its data, before a payload is refused as oversized."""
_LARGEST_OWN = 2**40
_SUBNORMAL = 2.0**-133
"""Distance of bfloat16 numbers below the smallest normal one, where no relative bound holds."""


def encode(tensors: Mapping[str, Tensor], packing: Packing | str, draw: torch.Generator | None = None) -> bytes:
    """Pack tensors.

    Args:
        tensors: by name.
        packing: how; a codec's name alone stands for that codec with nothing else.
        draw: where the rounding of int8 and int4 is drawn from, tensor after tensor in order of name.

    Raises:
        ValueError: for a packing that rounds at random without a ``draw``.
    """
    packing = _packing(packing)
    manifest = manifest_of(tensors)
    if packing.plain:
        parts = {name: _cast(tensors[name], packing.rule.dtype) for name in manifest}
    else:
        parts = _flat_parts(tensors, manifest, packing, draw)
    content: bytes = save(parts, metadata=metadata_of(manifest, packing))
    return compress(content, packing.zstd) if packing.zstd else content


def decode(payload: bytes, manifest: Manifest, packing: Packing | str, refuse: Refuse = wire_error) -> Tensors:
    """Unpack a payload that must hold exactly the tensors of ``manifest``, packed as ``packing`` says.

    The size is checked before anything is unpacked or parsed, and names, shapes and dtypes against the manifest before
    any tensor is used.

    Args:
        payload: bytes from another process.
        manifest: the expected shape of every tensor by name.
        packing: how it must be packed.
        refuse: makes the exception from a reason word and a detail; by default a WireError.

    Returns:
        Float32 tensors; of a cast or with places they may hold what is not finite.

    Raises:
        WireError: or what ``refuse`` makes, for anything that is not exactly as expected: oversized, malformed, codec,
            keys, shape, dtype; of codes non_finite (a block was), scale, code; of places places.
    """
    packing = _packing(packing)
    wire = wire_of(manifest, packing)
    expected = wire_bytes(wire)
    limit = expected + _OVERHEAD_BYTES * (len(manifest) + 1)
    if len(payload) > limit:
        raise refuse("oversized", f"has {len(payload)} bytes where about {expected} are expected")
    content = decompress(payload, limit, refuse) if packing.zstd else payload
    tag, _, shapes = _told(content, refuse).partition(" ")
    if tag != packing.tag:
        raise refuse("codec", f"is not packed with {packing.tag!r}")
    try:
        parts = load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError):  # past int64: TypeError
        raise refuse("malformed", "is no safetensors file") from None
    if parts.keys() != wire.keys():
        extra, missing = parts.keys() - wire.keys(), wire.keys() - parts.keys()
        raise refuse("keys", f"has {len(extra)} unknown tensors and lacks {len(missing)}")
    if not packing.plain and shapes != shapes_text(manifest):
        raise refuse("shape", "tells other shapes than expected")
    for name, (dtype, shape) in wire.items():
        if tuple(parts[name].shape) != shape:
            raise refuse("shape", f"has shape {tuple(parts[name].shape)} for {name}; expected {shape}")
        if parts[name].dtype != dtype:
            raise refuse("dtype", f"has {parts[name].dtype} for {name}; expected {dtype}")
    if packing.plain:
        return {name: parts[name].to(torch.float32) for name in manifest}
    found = _from_flat(parts, manifest, packing, refuse)
    return {name: found[name] for name in manifest}


def largest_errors(tensors: Mapping[str, Tensor], packing: Packing) -> Tensors:
    """Return the bound of each entry's error when all entries travel: 0 throughout for an exact codec."""
    rule = packing.rule
    if rule.bits is None:
        floor = _SUBNORMAL if rule.relative_error else 0.0
        return {name: (value.abs().float() * rule.relative_error).clamp(min=floor) for name, value in tensors.items()}
    return {
        name: error_bound(value.float().flatten(), rule.bits, packing.block).view_as(value)
        for name, value in tensors.items()
    }


def told_manifest(payload: bytes, packing: Packing | str) -> Manifest:
    """Return the shapes that a payload of one's own tells, for who has nothing else to read it by."""
    packing = _packing(packing)
    content = decompress(payload, _LARGEST_OWN, wire_error) if packing.zstd else payload
    parts = {name: value for name, value in load(content).items() if name not in (SCALES, PLACES)}
    if packing.plain:
        return manifest_of(parts)
    return shapes_of(list(parts), _told(content, wire_error).partition(" ")[2])


def _packing(packing: Packing | str) -> Packing:
    return Packing(packing) if isinstance(packing, str) else packing


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype).contiguous()


def _flat_parts(
    tensors: Mapping[str, Tensor], manifest: Manifest, packing: Packing, draw: torch.Generator | None
) -> Tensors:
    bits = packing.rule.bits
    if bits is not None and draw is None:
        raise ValueError(f"{packing.codec} rounds at random and got no generator; expected one keyed by round and site")
    parts: Tensors = {}
    scales, places = [], []
    for name in manifest:
        values = _cast(tensors[name], torch.float32).flatten()
        if packing.top_k is not None:
            where = largest_places(values, num_kept(len(values), packing.top_k))
            values = values[where]
            places.append(where)
        if bits is None:
            parts[name] = values.to(packing.rule.dtype)
            continue
        own = block_scales(values, bits, packing.block)
        uniform = torch.rand(len(values), generator=draw, dtype=torch.float64)
        codes = quantise(values, own, uniform, bits, packing.block)
        parts[name] = pack_nibbles(codes) if bits == 4 else codes
        scales.append(own)
    if scales:
        parts[SCALES] = torch.cat(scales)
    if places:
        parts[PLACES] = torch.cat(places).to(places_as(manifest))
    return parts


def _from_flat(parts: Tensors, manifest: Manifest, packing: Packing, refuse: Refuse) -> Tensors:
    bits = packing.rule.bits
    names = sorted(manifest)
    sent = [num_sent(manifest[name], packing) for name in names]
    if bits is None or not names:
        values = [parts[name].to(torch.float32) for name in names]
    else:
        _expect_scales(parts[SCALES], bits, refuse)
        scales = torch.split(parts[SCALES], [num_blocks(count, packing.block) for count in sent])
        codes = [_codes(parts[name], count, bits, refuse) for name, count in zip(names, sent, strict=True)]
        values = [dequantise(own, scale, packing.block) for own, scale in zip(codes, scales, strict=True)]
    whole = dict(zip(names, values, strict=True))
    if packing.top_k is not None and names:
        for name, where in zip(names, torch.split(parts[PLACES].to(torch.int64), sent), strict=True):
            count = math.prod(manifest[name])
            if not are_places(where, count):
                raise refuse("places", f"has places for {name} that are not ascending below {count}")
            whole[name] = spread(whole[name], where, count)
    return {name: value.view(manifest[name]) for name, value in whole.items()}


def _expect_scales(scales: Tensor, bits: int, refuse: Refuse) -> None:
    values = scales.float()
    if not bool(torch.isfinite(values).all()):
        raise refuse("non_finite", "has a block that is not finite")
    small = (values < SMALLEST_SCALE) & (values != 0)
    if bool((small | torch.signbit(values) | torch.isinf(values * levels(bits))).any()):
        raise refuse("scale", "has a scale that is negative, too small or too large")


def _codes(part: Tensor, count: int, bits: int, refuse: Refuse) -> Tensor:
    codes = unpack_nibbles(part) if bits == 4 else part
    if bool((codes < -levels(bits)).any()) or bool(codes[count:].any()):
        raise refuse("code", f"has a code beyond {levels(bits)}, or one too many")
    return codes[:count]


def _told(content: bytes, refuse: Refuse) -> str:
    """Read what a payload says of itself from the safetensors header: 8 bytes length, then JSON."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > len(content) - 8:
            raise ValueError("header longer than the payload")
        return str(json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("codec"))
    except (ValueError, struct.error, AttributeError, RecursionError):
        raise refuse("malformed", "is no safetensors file") from None
