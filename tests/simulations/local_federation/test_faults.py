"""Processes killed at a random moment of a run, one of each kind, in two federations of real processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from simulations.local_federation.faults.disturbed import disturbed_federation
from simulations.local_federation.faults.trial import Trials

CASES = [
    *(("plain", kind) for kind in ("superlink", "executor", "serverapp", "gateway", "everything", "upload-supernode")),
    *(("private", kind) for kind in ("agent", "supernode", "clientapp", "upload-clientapp", "site")),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    with disturbed_federation(request.param, lambda said: None) as made:
        faults = Trials(made)
        faults.undisturbed()
        yield faults


@pytest.mark.parametrize(("trials", "kind"), CASES, indirect=["trials"])
def test_run_ends_complete_and_nothing_is_spent_twice(trials: Trials, kind: str) -> None:
    trial = trials.fault(kind, np.random.default_rng(len(kind)))
    assert trial.sound, trial
    assert (trial.same_bits is None) == (trials.made.kind == "private")
    assert (trial.budgets is None) == (trials.made.kind == "plain")
