"""What ``docs/codecs.md`` says of bytes, at the size of real factors."""

from __future__ import annotations

from simulations.results.codecs import LARGE_PACKINGS, LARGE_RANK, LARGE_SIDE, sizes, sizes_table


def test_int8_is_a_quarter_of_fp32_and_int4_an_eighth() -> None:
    found = sizes()
    entries = 4 * LARGE_RANK * LARGE_SIDE
    headers = found["fp32"] - 4 * entries
    assert 0 < headers < 1000
    assert found["int8"] < (1 + 2 / 64) * entries + 2 * headers
    assert found["int4"] < (1 / 2 + 2 / 64) * entries + 2 * headers
    assert found["int8, block 256, zstd 3"] < found["fp32"] / 4
    assert found["int4, block 128, zstd 3"] < found["fp32"] / 8


def test_table_has_a_line_for_each_packing() -> None:
    assert [line.split(" | ")[0][2:] for line in sizes_table().splitlines()[2:]] == list(LARGE_PACKINGS)
