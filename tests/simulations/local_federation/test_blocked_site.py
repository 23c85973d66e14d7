"""A site that is blocked for rounds: it spends nothing on those it missed, and is back in the next."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from server.transport import EXPIRES_AFTER_S
from simulations.local_federation.faults.checks import entries_of, rounds_of
from simulations.local_federation.faults.disturbed import disturbed_federation

pytestmark = pytest.mark.slow
DEADLINE_S, ROUNDS, WAIT_S = 15.0, 8, 300.0


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_requests_of_rounds_that_are_over_reach_no_site() -> None:
    with disturbed_federation("private", ROUNDS, lambda said: None) as made:
        federation = made.config.federation.model_copy(update={"round_timeout_s": DEADLINE_S})
        made.config = made.config.model_copy(update={"federation": federation})
        blocked = sorted(made.sites)[0]
        place = made.submit("blocked")
        until(lambda: place.completed_rounds() >= 1)
        agent = made.site_component(blocked, "agent")
        assert agent is not None
        os.kill(agent, signal.SIGSTOP)
        try:
            under_way = place.completed_rounds() + 1
            until(lambda: place.completed_rounds() > under_way)
            time.sleep(EXPIRES_AFTER_S + 1)
        finally:
            os.kill(agent, signal.SIGCONT)
        assert made.wait_until_over(place) == "completed"
        charged = {number for _, number in entries_of(made.sites[blocked])}
        records = {record["round"]: record for record in place.folder.iterate_records("round")}
        missed = under_way + 1
        assert records[missed]["sites"][blocked]["status"] == "late"
        assert missed not in charged
        assert max(rounds_of(place, blocked)) > missed
        assert all(record["seconds"]["total"] < DEADLINE_S + 10 for record in records.values())
