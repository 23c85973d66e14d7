"""The caretaker's process: ``python -m server.supervise.caretaker STATE``.

It brings the SuperLink in step with the enrolled sites, submits the runs that were asked for, and submits those that
died again, from their last checkpoint. One process does it at a time.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import FedtuneError, RunError
from common.flower_keys import CONFIG_YAML, RUN_FENCE, RUN_NAME
from common.run_source import APP_ROOT
from server.enrolment import Enrolment
from server.flower_commands import Flower
from server.run_place import RunPlace, Submission, known_runs
from server.state_folder import StateFolder, locked
from server.supervise.decision import Action, Decision, decide, needs_status, wait_s
from server.supervise.service import listens

logger = logging.getLogger(__name__)

POLL_S = 1.0
ASK_AGAIN_S = 5.0
"""Seconds between two questions to Flower about a submission whose ServerApp has not begun: each is a process, which
would compete with the ServerApp's start."""


class Caretaker:
    """Looks after sites and runs.

    Args:
        state: the state folder.
        flower: commands to the SuperLink.
        app: folder of the Flower app that is submitted.
        clock: seconds since 1970.
    """

    def __init__(
        self, state: StateFolder, flower: Flower, app: Path = APP_ROOT, clock: Callable[[], float] = time.time
    ) -> None:
        self._state, self._flower, self._app, self._clock = state, flower, app, clock
        self._enrolment = Enrolment(state)
        self._asked: dict[str, tuple[int, float]] = {}

    def look(self) -> None:
        """Do once what is due.

        Raises:
            RunError: if the SuperLink does not answer.
        """
        if not self._enrolment.settled():
            self._reconcile()
        places = [place for place in known_runs(self._state) if not place.submission().over]
        known: dict[int, str] | None = None
        for place in places:
            submission, live = place.submission(), place.is_live()
            status = None
            if needs_status(submission, live=live):
                if place.last_fence() != submission.fence and not self._may_ask(place.name, submission.fence):
                    continue
                known = self._flower.runs() if known is None else known
                status = known.get(submission.flower_run or 0)
                live = place.is_live()  # it may have begun, or ended, while Flower was asked
            decision = decide(
                submission, live=live, last_fence=place.last_fence(), outcome=place.outcome(), status=status,
                stop_wished=place.stop_wish.exists(), now_s=self._clock(),
            )  # fmt: skip
            self._act(place, submission, decision)

    def _reconcile(self) -> None:
        try:
            for site in self._enrolment.reconcile(self._flower):
                logger.info("site %s is %s", site.name, "turned away" if site.revoked else "registered")
        except RunError as error:  # runs go on with the sites there are
            logger.warning("sites are not in step with the SuperLink, tried again: %s", error)

    def _may_ask(self, name: str, fence: int) -> bool:
        """Whether it is time to ask about a submission that has not begun; the first time it always is."""
        asked, now = self._asked.get(name), self._clock()
        if asked is not None and asked[0] == fence and now - asked[1] < ASK_AGAIN_S:
            return False
        self._asked[name] = (fence, now)
        return True

    def _act(self, place: RunPlace, submission: Submission, decision: Decision) -> None:
        if decision.action is Action.END:
            place.write(submission.model_copy(update={"state": decision.ended, "reason": decision.reason}))
            logger.info("run %s is over: %s", place.name, decision.ended)
        elif decision.action is Action.SUBMIT:
            self._submit(place, submission)
        elif decision.action is Action.STOP_AND_SUBMIT and submission.flower_run is not None:
            self._stop(place, submission, submission.flower_run)

    def _stop(self, place: RunPlace, submission: Submission, flower_run: int) -> None:
        # Written before Flower is asked: should this process end in between, or Flower's answer be lost, then the run
        # that Flower has as stopped is not taken for one that an operator gave up.
        submission = submission.model_copy(update={"stopping": True})
        place.write(submission)
        try:
            self._flower.stop(flower_run)
        except RunError as error:
            logger.warning("run %s: Flower's run %d is not stopped, tried again: %s", place.name, flower_run, error)
            return
        self._submit(place, submission)

    def _submit(self, place: RunPlace, submission: Submission) -> None:
        if submission.state == "submitted":  # it died
            fruitless = 0 if place.completed_rounds() > submission.round_before else submission.fruitless + 1
            submission = submission.model_copy(update={"fruitless": fruitless})
            if fruitless:
                self._put_off(place, submission)
                return
        # The fence is raised before Flower is asked: should this process end in between, then whatever Flower started
        # meanwhile finds a newer fence once the run is submitted again, and two never work on one run.
        fence = submission.fence + 1
        opened = submission.model_copy(
            update={
                "fence": fence, "state": "submitting", "round_before": place.completed_rounds(),
                "stopping": False, "submitted_s": self._clock(), "reason": None,
            }
        )  # fmt: skip
        place.write(opened)
        carried: dict[str, str | int] = {CONFIG_YAML: submission.config_yaml, RUN_NAME: place.name, RUN_FENCE: fence}
        try:
            run = self._flower.run(self._app, carried)
        except FedtuneError as error:
            self._put_off(place, opened.model_copy(update={"fruitless": opened.fruitless + 1, "reason": str(error)}))
            raise
        runs = (*opened.flower_runs, run)
        place.write(opened.model_copy(update={"state": "submitted", "flower_run": run, "flower_runs": runs}))
        logger.info("run %s: submission %d is Flower's run %d", place.name, fence, run)

    def _put_off(self, place: RunPlace, submission: Submission) -> None:
        seconds = wait_s(submission.fruitless)
        place.write(submission.model_copy(update={"state": "waiting", "due_s": self._clock() + seconds}))
        logger.info("run %s: submitted again in %.0f s", place.name, seconds)


def main() -> None:
    """Look after the coordinator in a state folder until told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    state = StateFolder.open(Path(sys.argv[1]))
    port = state.config().superlink_port
    caretaker = Caretaker(state, Flower(state, port))
    with locked(state.path / "caretaker.lock", wait=False, what=f"the caretaker of {state.path}"):
        while True:
            if listens(port):
                try:
                    caretaker.look()
                except RunError as error:
                    logger.warning("%s", error)
                except FedtuneError as error:
                    logger.error("%s", error)
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
