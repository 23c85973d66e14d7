"""What tensors are in a payload, with which dtype and shape, for a manifest and a packing.

A plain packing has every tensor under its own name in its own shape. Any other has, flat, the entries that travel of
each tensor under its name, and beside them

- ``#scales``: bfloat16, the scales of all blocks, tensor after tensor in order of name;
- ``#places``: uint16 or uint32, where the entries stand, likewise.

The metadata has one entry, ``codec``, as several would come in any order and give other bytes: the packing's tag and,
where tensors travel flat, a space and their shapes in order of name, sizes parted by commas, tensors by semicolons.
"""

from __future__ import annotations

import math

import torch

from common.codecs.blocks import num_blocks
from common.codecs.packing import Packing
from common.codecs.sparse import num_kept, place_dtype
from common.tensors import Manifest

SCALES, PLACES = "#scales", "#places"

Wire = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor of a payload, by name."""


def num_sent(shape: tuple[int, ...], packing: Packing) -> int:
    """Return how many entries of a tensor travel."""
    count = math.prod(shape)
    return count if packing.top_k is None else num_kept(count, packing.top_k)


def places_as(manifest: Manifest) -> torch.dtype:
    """Return what places travel as: wide enough for the largest tensor."""
    return place_dtype(max((math.prod(shape) for shape in manifest.values()), default=0))


def wire_of(manifest: Manifest, packing: Packing) -> Wire:
    """Return what a payload must hold."""
    dtype, bits = packing.rule.dtype, packing.rule.bits
    if packing.plain:
        return {name: (dtype, shape) for name, shape in manifest.items()}
    sent = {name: num_sent(shape, packing) for name, shape in manifest.items()}
    wire: Wire = {name: (dtype, (-(-count // 2) if bits == 4 else count,)) for name, count in sent.items()}
    if bits is not None and sent:
        wire[SCALES] = (torch.bfloat16, (sum(num_blocks(count, packing.block) for count in sent.values()),))
    if packing.top_k is not None and sent:
        wire[PLACES] = (places_as(manifest), (sum(sent.values()),))
    return wire


def wire_bytes(wire: Wire) -> int:
    """Return the bytes of a payload's tensors."""
    return sum(math.prod(shape) * torch.empty(0, dtype=dtype).element_size() for dtype, shape in wire.values())


def metadata_of(manifest: Manifest, packing: Packing) -> dict[str, str]:
    """Return what a payload says of itself."""
    return {"codec": packing.tag if packing.plain else f"{packing.tag} {shapes_text(manifest)}"}


def shapes_text(manifest: Manifest) -> str:
    """Return the shapes in order of name, as metadata tell them."""
    return ";".join(",".join(map(str, manifest[name])) for name in sorted(manifest))


def shapes_of(names: list[str], text: str) -> Manifest:
    """Return the manifest that :func:`shapes_text` made ``text`` of, for these names."""
    shapes = [tuple(int(size) for size in part.split(",") if size) for part in text.split(";")]
    return dict(zip(sorted(names), shapes, strict=True)) if names else {}
