"""How a message crosses the agent's socket: an opening line in JSON, then its parts in pieces of at most 1 MiB.

=========  =================================================================================================
opening    ``{"fedtune": 1, "kind": ..., "sizes": [...]}``, one size in bytes for each part
pieces     the parts one after another, each piece within one part
=========  =================================================================================================

Both ends count: a part that is larger than its limit is refused from the opening alone, and so is a message that ends
early or goes on. Standard library only, because the ClientApp imports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from common.errors import WireError

PIECE_BYTES = 1 << 20
OPENING_BYTES = 4096
ASKED = (1 << 20, 1 << 16, 1 << 30)
"""Most bytes of a request's parts: the run config, the header, the payload."""
ANSWERED = (1 << 16, 1 << 30)
"""Most bytes of an answer's parts: the header, the payload."""
_VERSION = 1


def cut(kind: str, parts: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the opening and the pieces of a message."""
    yield json.dumps({"fedtune": _VERSION, "kind": kind, "sizes": [len(part) for part in parts]}).encode()
    for part in parts:
        for start in range(0, len(part), PIECE_BYTES):
            yield part[start : start + PIECE_BYTES]


def join(frames: Iterable[bytes], limits: Sequence[int]) -> tuple[str, list[bytes]]:
    """Return kind and parts of a message that came from another process.

    Args:
        frames: the opening and the pieces; no more is taken from it than the opening announces.
        limits: most bytes of each part.

    Raises:
        WireError: for anything that :func:`cut` would not yield within the limits.
    """
    coming = iter(frames)
    kind, sizes = _opening(next(coming, b""), limits)
    parts = [_part(coming, size) for size in sizes]
    if next(coming, None) is not None:
        raise WireError("a message goes on after its last part; expected its end.")
    return kind, parts


def _opening(frame: bytes, limits: Sequence[int]) -> tuple[str, list[int]]:
    try:
        opening = json.loads(frame) if len(frame) <= OPENING_BYTES else None
    except (ValueError, RecursionError):
        opening = None
    if not isinstance(opening, dict) or set(opening) != {"fedtune", "kind", "sizes"} or opening["fedtune"] != _VERSION:
        raise WireError("a message has no opening; expected one of fedtune's.")
    kind, sizes = opening["kind"], opening["sizes"]
    if not isinstance(kind, str) or not isinstance(sizes, list) or len(sizes) != len(limits):
        raise WireError(f"a message's opening is malformed; expected a kind and {len(limits)} sizes.")
    for size, limit in zip(sizes, limits, strict=True):
        if type(size) is not int or not 0 <= size <= limit:
            raise WireError(f"a part of a message is larger than allowed, or no size; expected at most {limit} bytes.")
    return kind, sizes


def _part(coming: Iterator[bytes], size: int) -> bytes:
    pieces, left = [], size
    while left > 0:
        piece = next(coming, b"")
        if not 0 < len(piece) <= min(left, PIECE_BYTES):
            raise WireError("a message's pieces are not what its opening says; expected pieces of its parts.")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
