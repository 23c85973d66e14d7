"""What components leave behind: adopted, so that it can be found, and killed.

Code may leave its process group and its session, and outlive whoever started it. Linux gives such an orphan to the
nearest ancestor that asks for orphans, so whatever descends from that ancestor stays its descendant.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable
from types import TracebackType

import psutil

logger = logging.getLogger(__name__)

KILL_S = 5.0
"""Seconds within which what is killed has to be gone."""
_LOOK_S = 0.02
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_ADOPTS = sys.platform.startswith("linux")


class Orphans:
    """The orphans that this process adopts while the context lasts; only Linux lets it.

    The children that it has before are left alone. While the context lasts every other child must be named to the
    methods, or it is taken for an orphan.
    """

    def __init__(self) -> None:
        self._before: frozenset[psutil.Process] = frozenset()
        self._adopted_before = False

    def __enter__(self) -> None:
        self._before = frozenset(psutil.Process().children())
        self._adopted_before = _adopts()
        _adopt(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _adopt(self._adopted_before)

    def take_ended(self, own: Collection[int]) -> None:
        """Take the status of orphans that ended, which nobody else takes.

        Args:
            own: ids of children that are none.
        """
        spared = {*own, *(child.pid for child in self._before)}
        with contextlib.suppress(ChildProcessError):  # there is no child
            while _ADOPTS and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in spared:  # whose status is taken elsewhere; then the next one is seen
                    return
                os.waitpid(ended.si_pid, 0)

    def kill(self, own: Collection[int]) -> None:
        """Kill the orphans and what descends from them, and wait for their end.

        Args:
            own: ids of children that are none.
        """
        left = kill_descendants(psutil.Process(), {*map(psutil.Process, own), *self._before})
        deadline = time.monotonic() + KILL_S
        while left := {process for process in left if not _is_gone(process)}:
            if time.monotonic() > deadline:
                logger.error("%d processes that components left behind do not end, though killed", len(left))
                return
            time.sleep(_LOOK_S)


def kill_descendants(ancestor: psutil.Process, spared: Iterable[psutil.Process] = ()) -> set[psutil.Process]:
    """Kill all that descends from a process, but for some of its children and what descends from them.

    What is not killed yet may start more meanwhile. So it is looked for until two looks in a row find nothing new, also
    where all that is seen of a process has ended: other threads of it may go on.

    Returns:
        What was killed.
    """
    killed: set[psutil.Process] = set()
    deadline, in_vain = time.monotonic() + KILL_S, 0
    while in_vain < 2:
        if time.monotonic() > deadline:
            logger.error("what components left behind starts more processes than can be killed")
            break
        found = set(ancestor.children(recursive=True))
        for child in spared:  # after the others were looked for: what it starts in between is not among them
            with contextlib.suppress(psutil.Error):
                found -= {child, *child.children(recursive=True)}
        new = found - killed
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.kill()
        killed |= new
        in_vain = 0 if new else in_vain + 1
        time.sleep(_LOOK_S)
    return killed


def _is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(ChildProcessError):  # its parent has yet to end, and then it is ours
        os.waitpid(process.pid, os.WNOHANG)
    return not process.is_running()


def _adopts() -> bool:
    asked = ctypes.c_int(0)
    if _ADOPTS:
        ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(asked), 0, 0, 0)
    return bool(asked.value)


def _adopt(wished: bool) -> None:
    if _ADOPTS and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(wished), 0, 0, 0) != 0:
        logger.warning("the system gives this process no orphans; what leaves its process group may outlive it")
