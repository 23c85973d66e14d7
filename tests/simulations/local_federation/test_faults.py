"""Processes killed at a random moment of a run, in two federations of real processes.

A fault takes two to three minutes, so that four of the eleven are tried unless FEDTUNE_FAULTS is "all".
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from simulations.local_federation.faults.disturbed import disturbed_federation
from simulations.local_federation.faults.trial import Trials

CASES = [
    *(("plain", kind) for kind in ("superlink", "executor", "serverapp", "gateway", "everything", "upload-supernode")),
    *(("private", kind) for kind in ("agent", "supernode", "clientapp", "upload-clientapp", "site")),
]
TRIED = CASES if os.environ.get("FEDTUNE_FAULTS") == "all" else [
    ("plain", "serverapp"), ("plain", "everything"), ("private", "agent"), ("private", "supernode"),
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    with disturbed_federation(request.param, lambda said: None) as made:
        faults = Trials(made)
        faults.undisturbed()
        yield faults


@pytest.mark.parametrize(("trials", "kind"), TRIED, indirect=["trials"])
def test_run_ends_complete_and_nothing_is_spent_twice(trials: Trials, kind: str) -> None:
    trial = trials.fault(kind, np.random.default_rng(len(kind)))
    assert trial.sound, trial
    assert (trial.same_bits is None) == (trials.made.kind == "private")
    assert (trial.budgets is None) == (trials.made.kind == "plain")
