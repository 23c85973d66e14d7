"""zstd over a whole payload, and the way back that never makes more bytes than were agreed.

A frame from another process must say how long its content is; that is checked before anything is allocated, and so is
the window that it asks the reader to hold. One frame, without a dictionary, and nothing behind it.
"""

from __future__ import annotations

import zstandard

from common.codecs.refusal import Refuse

_SMALLEST_WINDOW = 1024


def compress(content: bytes, level: int) -> bytes:
    """Return one zstd frame that tells the length of its content."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(content)


def decompress(frame: bytes, limit: int, refuse: Refuse) -> bytes:
    """Return the content of a frame.

    Args:
        frame: bytes from another process.
        limit: most bytes that the content may have.
        refuse: makes the exception from a reason word and a detail.

    Raises:
        Exception: what ``refuse`` makes: "oversized" for content or a window beyond the limit, "codec" for what is no
            zstd, "malformed" for a frame that does not tell its length, is damaged, or has anything behind it.
    """
    if not frame.startswith(zstandard.FRAME_HEADER):
        raise refuse("codec", "is not packed with zstd")
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError:
        raise refuse("malformed", "has a broken zstd header") from None
    if header.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise refuse("malformed", "does not tell the length of its content")
    if header.content_size > limit:
        raise refuse("oversized", f"unpacks to {header.content_size} bytes where about {limit} are expected")
    if header.window_size > max(header.content_size, _SMALLEST_WINDOW):
        raise refuse("oversized", f"asks for a window of {header.window_size} bytes")
    if header.dict_id:
        raise refuse("malformed", "needs a dictionary")
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError:
        raise refuse("malformed", "is no single zstd frame") from None
    if len(content) != header.content_size:
        raise refuse("malformed", "is not as long as it tells")
    return content
