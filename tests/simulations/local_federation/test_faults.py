"""Processes killed at random moments of runs, one of each kind, in two federations of real processes."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.local_federation.faults.disturbed import disturbed_federation
from simulations.local_federation.faults.trial import Trial, Trials

CASES = {
    "plain": ("superlink", "executor", "serverapp", "gateway", "caretaker", "everything", "upload-supernode"),
    "private": ("agent", "supernode", "clientapp", "upload-clientapp", "site"),
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("federation", CASES)
def test_run_ends_complete_and_nothing_is_spent_twice(federation: str) -> None:
    kinds = CASES[federation]
    with disturbed_federation(federation, 2 * len(kinds), lambda said: None) as made:
        trials = Trials(made)
        trials.undisturbed()
        found: list[Trial] = []
        for _ in range(3):  # runs may be over before the last is killed; the next one goes on with it
            if left := kinds[len(found) :]:
                found += trials.run_with([(kind, np.random.default_rng(len(kind))) for kind in left])
    assert [trial.kind for trial in found] == list(kinds)
    for trial in found:
        assert trial.sound, trial
        assert (trial.same_bits is None) == (federation == "private")
        assert (trial.budgets is None) == (federation == "plain")
