"""Payloads that no honest site sends: each is refused by its reason word, before it can cost memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
import zstandard
from safetensors.torch import load, save

from common.codecs.codec import decode, encode
from common.codecs.compression import compress, decompress
from common.codecs.layout import PLACES, SCALES, shapes_text
from common.codecs.packing import Packing
from common.errors import AdmissionError
from common.tensors import Tensors, manifest_of

UPDATE: Tensors = {"a": torch.linspace(-1, 1, 63).view(7, 9), "b": torch.linspace(0, 3, 20)}
MANIFEST = manifest_of(UPDATE)
INT8, INT4 = Packing("int8", 16), Packing("int4", 16)
SPARSE = Packing("fp32", top_k=0.2)


def refused(payload: bytes, packing: Packing) -> str:
    with pytest.raises(AdmissionError) as caught:
        decode(payload, MANIFEST, packing, AdmissionError)
    return caught.value.reason


def altered(packing: Packing, change: Callable[[Tensors], Tensors], shapes: str = shapes_text(MANIFEST)) -> bytes:
    """An honest payload whose tensors are changed."""
    parts = load(encode(UPDATE, packing, torch.Generator()))
    told = {"codec": f"{packing.tag} {shapes}"}
    return save({name: value.contiguous() for name, value in change(parts).items()}, metadata=told)


def entry(name: str, place: int, value: float) -> Callable[[Tensors], Tensors]:
    """Set one entry."""

    def change(parts: Tensors) -> Tensors:
        spoilt = parts[name].clone()
        spoilt[place] = value
        return parts | {name: spoilt}

    return change


def places(*values: int) -> Callable[[Tensors], Tensors]:
    """Set the first places of "a"."""

    def change(parts: Tensors) -> Tensors:
        spoilt = parts[PLACES].to(torch.int64)
        spoilt[: len(values)] = torch.tensor(values)
        return parts | {PLACES: spoilt.to(parts[PLACES].dtype)}

    return change


ALTERED: dict[str, tuple[Packing, Callable[[Tensors], Tensors], str]] = {
    "NaN scale": (INT8, entry(SCALES, 1, float("nan")), "non_finite"),
    "infinite scale": (INT4, entry(SCALES, 0, float("inf")), "non_finite"),
    "negative scale": (INT8, entry(SCALES, 0, -0.5), "scale"),
    "negative zero scale": (INT8, entry(SCALES, 0, -0.0), "scale"),
    "denormal scale": (INT8, entry(SCALES, 0, 2.0**-130), "scale"),
    "huge scale": (INT8, entry(SCALES, 0, 2.0**122), "scale"),
    "scale too few": (INT8, lambda parts: parts | {SCALES: parts[SCALES][1:]}, "shape"),
    "scale too many": (INT8, lambda parts: parts | {SCALES: torch.cat([parts[SCALES]] * 2)}, "shape"),
    "float32 scales": (INT8, lambda parts: parts | {SCALES: parts[SCALES].float()}, "dtype"),
    "no scales": (INT8, lambda parts: {name: value for name, value in parts.items() if name != SCALES}, "keys"),
    "code -128": (INT8, entry("a", 3, -128), "code"),
    "code -8": (INT4, entry("b", 0, 0), "code"),
    "odd entry is a code": (INT4, entry("a", -1, 0x08 + (0x09 << 4)), "code"),
    "codes too few": (INT4, lambda parts: parts | {"a": parts["a"][:-1]}, "shape"),
    "signed for unsigned": (INT4, lambda parts: parts | {"a": parts["a"].view(torch.int8)}, "dtype"),
    "places descending": (SPARSE, places(5, 4), "places"),
    "place twice": (SPARSE, places(5, 5), "places"),
    "place beyond": (SPARSE, entry(PLACES, 12, 63), "places"),
    "places too few": (SPARSE, lambda parts: parts | {PLACES: parts[PLACES][:-1]}, "shape"),
    "places of 32 bits": (SPARSE, lambda parts: parts | {PLACES: parts[PLACES].to(torch.uint32)}, "dtype"),
    "no places": (SPARSE, lambda parts: {name: value for name, value in parts.items() if name != PLACES}, "keys"),
    "dense for sparse": (SPARSE, lambda parts: parts | {"a": torch.ones(63)}, "shape"),
    "one more tensor": (SPARSE, lambda parts: parts | {"c": torch.ones(1)}, "keys"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_altered_payload_is_refused_with_its_reason(what: str) -> None:
    packing, change, reason = ALTERED[what]
    decode(altered(packing, lambda parts: parts), MANIFEST, packing, AdmissionError)
    assert refused(altered(packing, change), packing) == reason


def test_other_packing_or_shapes_than_agreed_are_refused() -> None:
    assert refused(encode(UPDATE, Packing("int8", 32), torch.Generator()), INT8) == "codec"
    assert refused(encode(UPDATE, Packing("fp32", top_k=0.3)), SPARSE) == "codec"
    assert refused(altered(INT4, lambda parts: parts, shapes="9,7;20"), INT4) == "shape"
    assert refused(encode(UPDATE, Packing("fp32", zstd=3)), Packing("fp32")) == "malformed"
    assert refused(encode(UPDATE, "fp32"), Packing("fp32", zstd=3)) == "codec"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max])
@pytest.mark.parametrize("packing", [INT8, INT4, Packing("int4", 16, top_k=0.5)], ids=lambda packing: packing.tag)
def test_update_that_is_not_finite_is_packed_so_that_it_shows(packing: Packing, value: float) -> None:
    spoilt = UPDATE["a"].clone()
    spoilt[2, 3] = value
    assert refused(encode(UPDATE | {"a": spoilt}, packing, torch.Generator()), packing) == "non_finite"


ZSTD = Packing("fp32", zstd=3)
HONEST = encode(UPDATE, ZSTD)


def forged(descriptor: int, *rest: bytes) -> bytes:
    """A frame's header by RFC 8878, section 3.1.1.1, and nothing real behind it."""
    return b"".join([zstandard.FRAME_HEADER, bytes([descriptor]), *rest, b"\x01\x00\x00"])


def without_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


FRAMES: dict[str, tuple[bytes, str]] = {
    "bomb": (compress(bytes(2**26), 19), "oversized"),
    "tells a terabyte": (forged(0xE0, (2**40).to_bytes(8, "little")), "oversized"),
    "window of 128 MiB": (forged(0x80, bytes([17 << 3]), (500).to_bytes(4, "little")), "oversized"),
    "more than it tells": (forged(0x20, b"\x05") + HONEST[6:], "malformed"),
    "tells no size": (without_size(encode(UPDATE, "fp32")), "malformed"),
    "second frame": (HONEST + HONEST, "malformed"),
    "something behind it": (HONEST + b"\0", "malformed"),
    "cut short": (HONEST[:-3], "malformed"),
    "header alone": (HONEST[:5], "malformed"),
    "skippable frame first": (b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + HONEST, "codec"),
    "with a dictionary": (forged(0x21, b"\x07", b"\x05"), "malformed"),
    "nothing": (b"", "codec"),
    "honest about nothing": (compress(b"", 3), "malformed"),
}


@pytest.mark.parametrize("what", FRAMES)
def test_hostile_frame_is_refused_before_it_takes_memory(what: str) -> None:
    payload, reason = FRAMES[what]
    decode(HONEST, MANIFEST, ZSTD, AdmissionError)
    tracemalloc.start()
    try:
        assert refused(payload, ZSTD) == reason
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_content_of_exactly_the_limit_passes_and_one_byte_more_does_not() -> None:
    frame = compress(bytes(1000), 3)
    assert decompress(frame, 1000, AdmissionError) == bytes(1000)
    with pytest.raises(AdmissionError, match="oversized"):
        decompress(frame, 999, AdmissionError)
