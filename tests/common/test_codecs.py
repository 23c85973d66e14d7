"""Codecs: their error bounds as laws, slow references, the bytes they take."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.blocks import block_scales, dequantise, error_bound, pack_nibbles, quantise, unpack_nibbles
from common.codecs.codec import decode, encode, largest_errors, told_manifest
from common.codecs.packing import CODECS, Packing
from common.codecs.sparse import largest_places, num_kept
from common.tensors import Tensors, manifest_of

FLOATS = st.floats(-(2.0**126), 2.0**126, width=32) | st.floats(-1.0, 1.0, width=32)
VECTORS = st.lists(FLOATS, min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float32))
PACKINGS = [
    Packing("fp32"), Packing("bf16"), Packing("int8"), Packing("int4", 32), Packing("fp32", zstd=3),
    Packing("fp32", top_k=0.3), Packing("int8", 16, top_k=0.2), Packing("int4", 16, 0.5, 9),
]  # fmt: skip


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {
        "b": torch.randn(7, 9) * 1e-3, "a": torch.randn(33), "none": torch.zeros(5), "one": torch.tensor(2.0),
        "empty": torch.zeros(0, 3), "long": torch.randn(300, 300),
    }  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60, deadline=None)
@given(values=VECTORS, seed=st.integers(0, 99), block=st.sampled_from([1, 8, 64]))
def test_rounding_is_off_by_the_blocks_scale_at_most(bits: int, values: torch.Tensor, seed: int, block: int) -> None:
    scales = block_scales(values, bits, block)
    uniform = torch.rand(len(values), generator=draw(seed), dtype=torch.float64)
    again = dequantise(quantise(values, scales, uniform, bits, block), scales, block)
    error = (again.double() - values.double()).abs()
    assert bool((error <= error_bound(values, bits, block).double()).all())
    largest = [float(part.abs().max()) for part in values.split(block)]
    for scale, most in zip(scales.tolist(), largest, strict=True):
        assert (scale == 0) == (most == 0)
        assert scale <= max(2.0**-126, (1 + 2.0**-7) * most / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60, deadline=None)
@given(values=VECTORS)
def test_rounding_is_exact_on_average(bits: int, values: torch.Tensor) -> None:
    """Over u at the middles of N equal parts of [0, 1) the mean of floor(y + u) is y to half a part."""
    parts, block = 64, 8
    scales = block_scales(values, bits, block)
    total = torch.zeros(len(values), dtype=torch.float64)
    for part in range(parts):
        uniform = torch.full((len(values),), (part + 0.5) / parts, dtype=torch.float64)
        total += dequantise(quantise(values, scales, uniform, bits, block), scales, block).double()
    off = (total / parts - values.double()).abs()
    assert bool((off <= error_bound(values, bits, block).double() * (0.5 / parts + 1e-9)).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_equals_the_definition_in_exact_arithmetic(bits: int) -> None:
    torch.manual_seed(1)
    values, block, most = torch.randn(50) * torch.logspace(-6, 3, 50), 8, 2 ** (bits - 1) - 1
    uniform = torch.rand(50, dtype=torch.float64)
    scales = block_scales(values, bits, block)
    codes = quantise(values, scales, uniform, bits, block)
    for place in range(50):
        scale = Fraction(scales[place // block].item())
        own = [abs(Fraction(value)) for value in values[place // block * block :][:block].tolist()]
        assert scale * most >= max(own)
        wanted = math.floor(Fraction(values[place].item()) / scale + Fraction(uniform[place].item()))
        assert codes[place].item() == max(-most, min(most, wanted))


@given(st.lists(st.integers(-7, 7), max_size=9))
def test_four_bits_come_back(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    assert len(packed) == (len(codes) + 1) // 2
    assert unpack_nibbles(packed).tolist() == codes + [0] * (len(codes) % 2)


@settings(max_examples=60, deadline=None)
@given(values=VECTORS)
def test_bf16_is_within_its_relative_error(values: torch.Tensor) -> None:
    again = decode(encode({"x": values}, "bf16"), {"x": tuple(values.shape)}, "bf16")["x"]
    normal = values.abs() >= 2.0**-126
    allowed = CODECS["bf16"].relative_error * values.double().abs()
    assert bool(((again.double() - values.double()).abs() <= allowed)[normal].all())


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing.tag} zstd {packing.zstd}")
def test_what_is_packed_comes_back_within_the_bound(packing: Packing) -> None:
    tensors = some()
    payload = encode(tensors, packing, draw())
    again = decode(payload, manifest_of(tensors), packing)
    assert payload == encode(dict(reversed(tensors.items())), packing, draw())
    assert told_manifest(payload, packing) == manifest_of(tensors)
    bounds = largest_errors(tensors, packing)
    for name, value in tensors.items():
        flat, found = value.flatten(), again[name].flatten()
        assert again[name].shape == value.shape
        assert again[name].dtype == torch.float32
        if packing.top_k is None:
            assert bool(((again[name] - value).abs() <= bounds[name]).all())
            continue
        kept = sorted(range(len(flat)), key=lambda place: (-abs(float(flat[place])), place))
        kept = kept[: num_kept(len(flat), packing.top_k)]
        rest = torch.ones(len(flat), dtype=torch.bool)
        rest[kept] = False
        assert not found[rest].any()
        if packing.codec == "fp32":
            assert torch.equal(found[kept], flat[kept])
        elif kept:
            assert float((found[kept] - flat[kept]).abs().max()) <= float(flat.abs().max()) / 6.9


def test_rounding_depends_on_the_draw_and_needs_one() -> None:
    tensors = some()
    assert encode(tensors, "int8", draw(1)) != encode(tensors, "int8", draw(2))
    with pytest.raises(ValueError, match="got no generator; expected one keyed by round and site"):
        encode(tensors, "int8")


def test_nothing_packed_is_nothing() -> None:
    for packing in PACKINGS:
        assert decode(encode({}, packing, draw()), {}, packing) == {}


def test_top_k_takes_the_first_of_equals_and_one_at_least() -> None:
    assert largest_places(torch.tensor([1.0, -2.0, 2.0, 0.5]), 2).tolist() == [1, 2]
    assert largest_places(torch.ones(5), 2).tolist() == [0, 1]
    assert largest_places(torch.tensor([1.0, math.nan, 9.0]), 1).tolist() == [1]
    assert [num_kept(count, 0.1) for count in (0, 1, 10, 11, 1000)] == [0, 1, 1, 2, 100]


def test_codes_take_a_quarter_and_an_eighth_of_the_bytes() -> None:
    """Factors of rank 8 on all of a layer of MiniLM's size, headers counted; a block's scale adds a 32nd a byte."""
    torch.manual_seed(0)
    tensors = {f"layer.{n}.attention.query.lora_{end}.weight": torch.randn(8, 384) for n in range(6) for end in "AB"}
    whole = len(encode(tensors, "fp32"))
    share = {codec: len(encode(tensors, codec, draw())) / whole for codec in CODECS}
    assert share["bf16"] == pytest.approx(0.5, abs=0.01)
    assert share["int8"] == pytest.approx(0.25 + 1 / 128, abs=0.01)
    assert share["int4"] == pytest.approx(0.125 + 1 / 128, abs=0.01)
    sparse = len(encode(tensors, Packing("int8", top_k=0.1), draw())) / whole
    assert sparse == pytest.approx(0.1 * (1 + 2 + 1 / 32) / 4, abs=0.01)
    assert len(encode(tensors, Packing("int4", zstd=3), draw())) < len(encode(tensors, "int4", draw()))
