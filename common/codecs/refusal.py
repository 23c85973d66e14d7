"""How a payload is refused: by whoever reads it, with a reason word and a detail."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import WireError

Refuse = Callable[[str, str], Exception]
"""Makes the exception from a reason word, such as "oversized", and a detail that goes on after "payload"."""


def wire_error(reason: str, detail: str) -> Exception:
    """Return the WireError of a payload that is not as expected."""
    return WireError(f"payload {detail}; refused as {reason}.")
