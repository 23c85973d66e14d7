"""What to do about a run: the rule by which a run that died goes on, and never twice.

A ServerApp survives the SuperLink, so a run whose ServerApp lives is left alone whatever Flower says. A run is
submitted again only if Flower has it as finished without an outcome of ours, or as running while no ServerApp lives (it
is stopped first; that the caretaker stops it is written down before, for a run that Flower has as stopped and nobody
here has stopped is over: an operator stopped it with Flower).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from server.run_place import Outcome, Submission

START_LIMIT_S = 600.0
"""Seconds from a submission until its ServerApp holds the lease of the run. Flower itself notices one that died before,
by its heartbeat, within about a minute."""
MOST_FRUITLESS = 6
"""Submissions in a row without a completed round after which a run counts as failed."""
LONGEST_WAIT_S = 60.0


class Action(Enum):
    """What the caretaker does about a run."""

    WAIT = "wait"
    SUBMIT = "submit"
    STOP_AND_SUBMIT = "stop and submit"
    END = "end"


@dataclass(frozen=True)
class Decision:
    """An action, and with END how the run ended."""

    action: Action
    ended: str | None = None
    reason: str | None = None


WAIT = Decision(Action.WAIT)


def decide(
    submission: Submission, *, live: bool, last_fence: int | None, outcome: Outcome | None, status: str | None,
    stop_wished: bool, now_s: float,
) -> Decision:  # fmt: skip
    """Apply the rule.

    Args:
        submission: the run's.
        live: whether a ServerApp holds its lease.
        last_fence: of the ServerApp that held the lease last.
        outcome: what a ServerApp said when it ended.
        status: Flower's status of the newest submission; None if Flower does not know it.
        stop_wished: whether an operator gave the run up.
        now_s: seconds since 1970.
    """
    if submission.over or live:
        return WAIT
    own = outcome if outcome is not None and outcome.fence == submission.fence else None
    if own is not None and (own.final or own.ended != "failed"):
        return Decision(Action.END, own.ended, own.reason)
    if stop_wished:
        return Decision(Action.END, "stopped")
    if now_s < submission.due_s:
        return WAIT
    if submission.fruitless >= MOST_FRUITLESS:
        said = own.reason if own is not None else submission.reason
        reason = said or "its ServerApp died again and again"
        return Decision(Action.END, "failed", reason)
    if submission.state in ("waiting", "submitting") or status is None:
        return Decision(Action.SUBMIT)
    if status == "finished:stopped" and not submission.stopping:
        return Decision(Action.END, "stopped")
    if status.startswith("finished"):
        return Decision(Action.SUBMIT)
    if last_fence == submission.fence:  # it has begun, and lives no more
        return Decision(Action.STOP_AND_SUBMIT)
    if status != "pending" and now_s - submission.submitted_s > START_LIMIT_S:
        return Decision(Action.STOP_AND_SUBMIT)
    return WAIT


def needs_status(submission: Submission, *, live: bool) -> bool:
    """Whether the rule wants to know what Flower says: it costs a process to ask."""
    return not live and submission.state == "submitted"


def wait_s(fruitless: int) -> float:
    """Return the seconds to wait before a submission after ``fruitless`` ones in a row."""
    return 0.0 if fruitless == 0 else min(LONGEST_WAIT_S, 2.0**fruitless)
