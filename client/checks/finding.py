"""One line of the table that fedtune-client check prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from client.refusals import log_line
from common.errors import FedtuneError


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: what was looked at.
        outcome: pass, fail, or note where it can be gone on with or is not known.
        found: what was found; for the site's own eyes.
        remedy: what to do; empty for a pass.
    """

    what: str
    outcome: Literal["pass", "fail", "note"]
    found: str
    remedy: str = ""

    def values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def finding_of(what: str, look: Callable[[], Finding | str]) -> Finding:
    """Return what a check finds; an error of ours is a fail with its own words, remedy included."""
    try:
        found = look()
    except FedtuneError as error:
        text = " ".join(str(error).split())
        said, _, remedy = text.partition("; expected ")
        return Finding(what, "fail", said, f"expected {remedy}" if remedy else "")
    except (OSError, RuntimeError) as error:
        return Finding(what, "fail", log_line(error), "Look at the place that is named, or run it with --debug.")
    return found if isinstance(found, Finding) else Finding(what, "pass", found)
