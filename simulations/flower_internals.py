"""The classes that Flower keeps to itself and an own Grid needs, in one place."""

from __future__ import annotations

from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "empty_run", "identify_process"]


def empty_run() -> Run:
    """Return the run of a virtual federation."""
    return Run.create_empty(run_id=1)


def identify_process() -> None:
    """Set what Flower's Message reads when it is made or answered; a SuperNode would set it."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
