"""Which run a call is for: several runs share the coordinator's one TCP port, and the first to begin has it."""

from __future__ import annotations

from collections.abc import Iterable

RUN_KEY = "fedtune-run"
"""Key of the run's name in the metadata of a call."""


def addressed_to(run: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of calls for a run."""
    return ((RUN_KEY, run),)


def misaddressed(run: str, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return why a call to the service of ``run`` is not answered; None if it is for that run, or names none."""
    asked = dict(metadata).get(RUN_KEY, run)
    if asked == run:
        return None
    return (
        f"run {run!r} answers here, not {asked!r}; expected the run that has control_port now. Leave out --tcp: each "
        "run answers on its unix socket."
    )
