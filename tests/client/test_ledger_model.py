"""Any sequence of reservations and commits, against a dictionary and a sum."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import client.ledger.spending
import client.ledger.store
from client.site_config import Budget
from common.errors import PrivacyError
from tests.client.ledgers import OTHER_RUN, RUN, charge, counted_steps, dataset, new_ledger, request, words


class AgainstPlainModel(RuleBasedStateMachine):
    """What was asked and answered, kept in plain Python; datasets are spans of numbered rows."""

    cap = 40

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(client.ledger.spending, "epsilon_spent", counted_steps)
        self.ledger = new_ledger(Path(self.folder.name) / "ledger.db")
        self.entries: dict[tuple[str, int], tuple[tuple[int, int], int, str]] = {}
        self.released: dict[tuple[str, int], bytes] = {}
        self.held: list[tuple[str, int]] = []
        self.sent = 0

    @initialize(releases=st.integers(1, 3))
    def keep(self, releases: int) -> None:
        self.kept_releases = releases
        self.patch.setattr(client.ledger.store, "KEPT_RELEASES", releases)

    runs = st.sampled_from([RUN, OTHER_RUN])
    rounds, asks = st.integers(1, 4), st.sampled_from(["one", "two"])
    spans = st.tuples(st.integers(0, 5), st.integers(1, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))

    @rule(run=runs, number=rounds, asks=asks, span=spans, steps=st.integers(1, 25))
    def reserve(self, run: str, number: int, asks: str, span: tuple[int, int], steps: int) -> None:
        key, rows = (run, number), dataset(words(*span))
        known = self.entries.get(key)
        near = [s for other, s, _ in self.entries.values() if other[0] < span[1] and span[0] < other[1]]
        if known is not None:
            open_still = known[:2] == (span, steps) and all(r != run or later <= number for r, later in self.entries)
            allowed = asks == known[2] and (key in self.held if key in self.released else open_still)
        else:
            allowed = sum(near) + steps <= self.cap
        try:
            got = self.ledger.reserve(request(number, run, asks), rows, charge(steps), Budget(epsilon=self.cap))
        except PrivacyError:
            assert not allowed
        else:
            assert allowed
            assert got == self.released.get(key)
            self.entries.setdefault(key, (span, steps, asks))

    @rule(run=runs, number=rounds, asks=asks)
    def commit(self, run: str, number: int, asks: str) -> None:
        key, self.sent = (run, number), self.sent + 1
        known = self.entries.get(key)
        allowed = known is not None and known[2] == asks and (key not in self.released or key in self.held)
        try:
            got = self.ledger.commit(request(number, run, asks), str(self.sent).encode())
        except PrivacyError:
            assert not allowed
        else:
            assert allowed
            if key not in self.released:
                later = [other for other in self.held if other[0] != run or other[1] > number]
                self.held = [*later, key][-self.kept_releases :]
            assert got == self.released.setdefault(key, str(self.sent).encode())

    @rule(run=runs, number=rounds, span=spans)
    def take_part(self, run: str, number: int, span: tuple[int, int]) -> None:
        self.reserve(run, number, "one", span, 1)
        self.commit(run, number, "one")

    @invariant()
    def no_record_is_beyond_the_cap(self) -> None:
        for record in range(8):
            assert sum(s for (low, high), s, _ in self.entries.values() if low <= record < high) <= self.cap
        assert self.ledger.history().entries.keys() == self.entries.keys()

    def teardown(self) -> None:
        self.ledger.verify()
        self.patch.undo()
        self.folder.cleanup()


AgainstPlainModel.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestLedgerAgainstPlainModel = AgainstPlainModel.TestCase
