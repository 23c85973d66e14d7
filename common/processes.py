"""A process, told from any other that is given its id later."""

from __future__ import annotations

from typing import Any

import psutil


def identity_of(pid: int) -> dict[str, Any]:
    """Return the id of a process with when it was made: ids are used again.

    Raises:
        psutil.NoSuchProcess: if there is none.
    """
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


def process_of(identity: dict[str, Any] | None) -> psutil.Process | None:
    """Return the very process that :func:`identity_of` named, None where it has ended or nothing names one."""
    if identity is None or not isinstance(pid := identity.get("pid"), int) or pid < 1:
        return None
    try:
        process = psutil.Process(pid)
        lives = process.create_time() == identity.get("created") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if lives else None


def is_alive(identity: dict[str, Any] | None) -> bool:
    """Whether the very process that :func:`identity_of` named still runs."""
    return process_of(identity) is not None
