"""Processes: told from others that are given their ids later, kept going where the system refuses, their logs short."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)


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


class Retries:
    """What the system refuses, as on a full disk or where no process can be made: said once, and tried again.

    Args:
        logger: what it is said to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, str] = {}

    @contextlib.contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Go on where the system refuses something, which the caller tries again at a later look."""
        try:
            yield
        except (OSError, subprocess.SubprocessError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if self._said.get(what) != why:
                self._logger.warning("%s: %s; it is tried again", what, why)
            self._said[what] = why
        else:
            self._said.pop(what, None)


def trim_log(path: Path, largest_bytes: int) -> None:
    """Move what a log holds to ``.1`` once it is large; the process that appends to it goes on at its start."""
    if not path.exists() or path.stat().st_size <= largest_bytes:
        return
    try:
        shutil.copyfile(path, path.with_suffix(".log.1"))
    except OSError as error:  # a full disk, say: the components must not end for it
        logger.warning("%s cannot be put aside and is dropped: %s", path.name, error)
    os.truncate(path, 0)
