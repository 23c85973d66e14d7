"""The rule by which a run that died goes on: each of its sentences, and that it never submits what lives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.run_place import Outcome, Submission
from server.supervise.decision import LONGEST_WAIT_S, MOST_FRUITLESS, START_LIMIT_S, Action, decide, wait_s

NOW = 1000.0
STATES = ["waiting", "submitting", "submitted", "completed", "stopped", "failed"]
STATUSES = [
    None, "pending", "starting", "running", "finished:completed", "finished:failed", "finished:stopped",
]  # fmt: skip


def submission(**changes: Any) -> Submission:
    known: dict[str, Any] = {
        "name": "tiny", "config_yaml": "", "asked": "", "state": "submitted", "fence": 3, "flower_run": 7,
        "submitted_s": NOW,
    }  # fmt: skip
    return Submission(**{**known, **changes})


def what(of: Submission | None = None, **changes: Any) -> Action:
    known: dict[str, Any] = {
        "live": False, "last_fence": 3, "outcome": None, "status": "running", "stop_wished": False, "now_s": NOW,
    }  # fmt: skip
    return decide(of or submission(), **{**known, **changes}).action


def test_new_run_is_submitted() -> None:
    assert what(submission(state="waiting", fence=0, flower_run=None), last_fence=None, status=None) is Action.SUBMIT


def test_superlink_killed_alone_leaves_the_run_with_its_live_serverapp() -> None:
    assert what(live=True, status="finished:failed") is Action.WAIT


def test_executor_killed_submits_again_once_flower_has_it_as_failed() -> None:
    assert what(status="finished:failed") is Action.SUBMIT


def test_everything_killed_stops_the_run_that_still_reads_running_first() -> None:
    assert what(status="running") is Action.STOP_AND_SUBMIT


def test_serverapp_that_has_not_begun_is_waited_for() -> None:
    assert what(last_fence=2, status="starting") is Action.WAIT
    assert what(last_fence=None, status="pending") is Action.WAIT


def test_serverapp_that_never_begins_is_given_up_but_not_one_that_is_still_to_be_started() -> None:
    late = NOW + START_LIMIT_S + 1
    assert what(last_fence=2, status="running", now_s=late) is Action.STOP_AND_SUBMIT
    assert what(last_fence=2, status="pending", now_s=late) is Action.WAIT


def test_run_that_flower_has_lost_with_its_database_is_submitted_again() -> None:
    assert what(status=None) is Action.SUBMIT


def test_caretaker_that_died_while_it_submitted_submits_with_a_new_fence() -> None:
    assert what(submission(state="submitting"), last_fence=2, status=None) is Action.SUBMIT


@pytest.mark.parametrize("ended", ["completed", "stopped"])
def test_run_that_said_how_it_ended_is_over_whatever_flower_says(ended: Any) -> None:
    for status in STATUSES:
        decision = decide(
            submission(), live=False, last_fence=3, outcome=Outcome(fence=3, ended=ended), status=status,
            stop_wished=False, now_s=NOW,
        )  # fmt: skip
        assert (decision.action, decision.ended) == (Action.END, ended)


def test_error_that_would_come_again_ends_the_run_and_another_does_not() -> None:
    failed = {"fence": 3, "ended": "failed", "reason": "why"}
    assert what(outcome=Outcome(**failed, final=True), status="finished:failed") is Action.END
    assert what(outcome=Outcome(**failed, final=False), status="finished:failed") is Action.SUBMIT


def test_outcome_of_an_older_submission_does_not_count() -> None:
    assert what(outcome=Outcome(fence=2, ended="completed"), status="finished:failed") is Action.SUBMIT


def test_run_that_dies_again_and_again_without_a_round_ends_with_the_last_reason() -> None:
    decision = decide(
        submission(fruitless=MOST_FRUITLESS), live=False, last_fence=3, status="finished:failed", stop_wished=False,
        outcome=Outcome(fence=3, ended="failed", reason="no sites", final=False), now_s=NOW,
    )  # fmt: skip
    assert (decision.action, decision.ended, decision.reason) == (Action.END, "failed", "no sites")


def test_operator_who_stopped_it_with_flower_is_obeyed() -> None:
    assert what(status="finished:stopped") is Action.END


def test_run_that_the_caretaker_stopped_itself_is_submitted_again() -> None:
    assert what(submission(stopping=True), status="finished:stopped") is Action.SUBMIT
    assert what(submission(stopping=True), status="running") is Action.STOP_AND_SUBMIT


outcomes = st.none() | st.builds(
    Outcome, fence=st.integers(0, 4), ended=st.sampled_from(["completed", "stopped", "failed"]), final=st.booleans()
)


@given(
    st.sampled_from(STATES), st.integers(0, MOST_FRUITLESS), st.none() | st.integers(0, 4), outcomes,
    st.sampled_from(STATUSES), st.booleans(), st.floats(0, 5000),
)  # fmt: skip
def test_what_lives_or_is_over_is_never_touched(
    state: Any, fruitless: int, last_fence: int | None, outcome: Outcome | None, status: str | None, wished: bool,
    now_s: float,
) -> None:  # fmt: skip
    of = submission(state=state, fruitless=fruitless)
    known: dict[str, Any] = {
        "last_fence": last_fence, "outcome": outcome, "status": status, "stop_wished": wished, "now_s": now_s,
    }  # fmt: skip
    assert what(of, live=True, **known) is Action.WAIT
    if of.over:
        assert what(of, **known) is Action.WAIT


def test_waits_grow_and_are_bounded() -> None:
    waits = [wait_s(number) for number in range(20)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_S
