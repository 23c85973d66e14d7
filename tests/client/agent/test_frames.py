"""Frames: what is cut is joined again, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent.frames import OPENING_BYTES, PIECE_BYTES, cut, join
from common.errors import WireError

LIMITS = (1 << 22, 100)


@given(st.text(max_size=20), st.integers(0, 3 * PIECE_BYTES + 1), st.binary(max_size=100))
def test_what_is_cut_is_joined_again(kind: str, size: int, second: bytes) -> None:
    first = bytes(size)
    frames = list(cut(kind, (first, second)))
    assert max(len(frame) for frame in frames) <= PIECE_BYTES
    assert join(frames, LIMITS) == (kind, [first, second])


def opening(**changes: object) -> bytes:
    return json.dumps({"fedtune": 1, "kind": "train", "sizes": [3, 0]} | changes).encode()


@pytest.mark.parametrize(
    "frames",
    [
        [], [b""], [b"\xff"], [b"[" * 4000], [b'"x"'], [b"{}"], [b" " * (OPENING_BYTES + 1) + opening(), b"abc"],
        [opening(fedtune=2), b"abc"], [opening(more=1), b"abc"], [opening(kind=7), b"abc"],
        [opening(sizes=[3]), b"abc"], [opening(sizes=[3, 0, 0]), b"abc"], [opening(sizes=["3", 0]), b"abc"],
        [opening(sizes=[True, 0]), b"a"], [opening(sizes=[-1, 0])], [opening(sizes=[0, 101])],
        [opening(sizes=[LIMITS[0] + 1, 0])], [opening(sizes=None)],
        [opening()], [opening(), b"ab"], [opening(), b"abcd"], [opening(), b"abc", b""], [opening(), b"", b"abc"],
        [opening(), b"abc", b"d"], [opening(sizes=[2 * PIECE_BYTES, 0]), bytes(2 * PIECE_BYTES)],
    ],
)  # fmt: skip
def test_anything_else_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError) as caught:
        join(frames, LIMITS)
    assert "\n" not in str(caught.value)


def test_no_more_is_taken_than_the_opening_announces() -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        yield opening(sizes=[5, 0])
        while True:
            taken += 1
            yield b"x"

    with pytest.raises(WireError, match="goes on"):
        join(endless(), LIMITS)
    assert taken == 6
