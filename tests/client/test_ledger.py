"""Reserve and commit: charged once, released once, across all datasets that share a record."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client.ledger.spending
from client.ledger.dataset import Dataset, identify
from client.ledger.ledger import Ledger
from client.ledger.store import KEPT_RELEASES, Store
from client.site_config import Budget
from common.data.examples import Example
from common.errors import PrivacyError
from tests.client.ledgers import OTHER_RUN, RUN, charge, counted_steps, dataset, new_ledger, request, words

ROWS = dataset(words(0, 6))


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """An empty ledger whose ε is the number of steps."""
    monkeypatch.setattr(client.ledger.spending, "epsilon_spent", counted_steps)
    return new_ledger(tmp_path / "ledger.db")


def spend(ledger: Ledger, rows: Dataset, steps: int, round_number: int = 1, run: str = RUN, cap: float = 100) -> None:
    asked = request(round_number, run)
    assert ledger.reserve(asked, rows, charge(steps), Budget(epsilon=cap)) is None
    ledger.commit(asked, b"noisy update")


def test_repeated_request_gets_what_was_committed_first(ledger: Ledger) -> None:
    asked = request()
    assert ledger.reserve(asked, ROWS, charge(), Budget(epsilon=10)) is None
    assert ledger.reserve(asked, ROWS, charge(), Budget(epsilon=10)) is None  # cut off, trained again, charged once
    assert ledger.commit(asked, b"first") == b"first"
    assert ledger.commit(asked, b"second") == b"first"
    assert ledger.reserve(asked, ROWS, charge(), Budget(epsilon=10)) == b"first"
    assert ledger.reserve(asked, dataset(words(9, 12)), charge(3), Budget(epsilon=1)) == b"first"
    assert len(ledger.history().entries) == 1


@pytest.mark.parametrize(
    ("asked", "rows", "steps", "line"),
    [
        (request(asks="another adapter"), ROWS, 10, "asked before with another adapter"),
        (request(), dataset(words(1, 6)), 10, "reserved for other rows"),
        (request(), ROWS, 11, "another noise"),
    ],
)
def test_reserved_round_is_not_trained_on_anything_else(
    ledger: Ledger, asked: Any, rows: Dataset, steps: int, line: str
) -> None:
    ledger.reserve(request(), ROWS, charge(), Budget(epsilon=100))
    with pytest.raises(PrivacyError, match=line):
        ledger.reserve(asked, rows, charge(steps), Budget(epsilon=100))


def test_round_that_was_left_open_is_not_trained_again_after_a_later_one(ledger: Ledger) -> None:
    assert ledger.reserve(request(1), ROWS, charge(1), Budget(epsilon=100)) is None
    spend(ledger, ROWS, 1, 1, OTHER_RUN)
    assert ledger.reserve(request(1), ROWS, charge(1), Budget(epsilon=100)) is None
    spend(ledger, ROWS, 1, 2)
    with pytest.raises(PrivacyError, match="left open and later rounds"):
        ledger.reserve(request(1), ROWS, charge(1), Budget(epsilon=100))
    spend(ledger, ROWS, 1, 3)
    assert len(ledger.history().entries) == 4


def test_commit_without_its_reservation_is_refused(ledger: Ledger) -> None:
    ledger.reserve(request(1), ROWS, charge(), Budget(epsilon=100))
    for asked in (request(2), request(1, OTHER_RUN), request(1, asks="another adapter")):
        with pytest.raises(PrivacyError, match="not reserved"):
            ledger.commit(asked, b"update")


def test_bytes_of_earlier_rounds_are_dropped_and_never_computed_anew(ledger: Ledger) -> None:
    spend(ledger, ROWS, 1, 1)
    spend(ledger, ROWS, 1, 1, OTHER_RUN)
    spend(ledger, ROWS, 1, 2)
    assert ledger.reserve(request(2), ROWS, charge(1), Budget(epsilon=100)) == b"noisy update"
    assert ledger.reserve(request(1, OTHER_RUN), ROWS, charge(1), Budget(epsilon=100)) == b"noisy update"
    for again in (lambda: ledger.reserve(request(1), ROWS, charge(1), Budget(epsilon=100)),
                  lambda: ledger.commit(request(1), b"other noise")):  # fmt: skip
        with pytest.raises(PrivacyError, match="dropped"):
            again()


@pytest.mark.parametrize("one_run", [False, True], ids=["runs of one round", "rounds of one run, last first"])
def test_bytes_of_all_but_the_newest_releases_are_dropped(ledger: Ledger, one_run: bool) -> None:
    count = 3 * KEPT_RELEASES
    asked = [request(count - n) if one_run else request(1, f"{n:032x}") for n in range(count)]
    sizes = []
    for n, one in enumerate(asked):
        ledger.reserve(one, ROWS, charge(1), Budget(epsilon=100))
        ledger.commit(one, bytes([n]) * 50_000)
        sizes.append(ledger.path.stat().st_size)
    assert sizes[-1] < sizes[KEPT_RELEASES] + 100_000
    for n, one in enumerate(asked):
        if n >= count - KEPT_RELEASES:
            assert ledger.reserve(one, ROWS, charge(1), Budget(epsilon=100)) == bytes([n]) * 50_000
            continue
        with pytest.raises(PrivacyError, match="dropped"):
            ledger.reserve(one, ROWS, charge(1), Budget(epsilon=100))
        with pytest.raises(PrivacyError, match="dropped"):
            ledger.commit(one, b"other noise")
    assert len(ledger.history().entries) == count
    ledger.verify()


def test_commit_that_does_not_end_drops_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [request(1, f"{n:032x}") for n in range(KEPT_RELEASES)]
    for one in kept:
        ledger.reserve(one, ROWS, charge(1), Budget(epsilon=100))
        ledger.commit(one, one.run.encode())
    ledger.reserve(request(1), ROWS, charge(1), Budget(epsilon=100))
    keep = Store.keep_payload

    def cut_off(self: Store, *release: Any) -> None:
        keep(self, *release)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep_payload", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ledger.commit(request(1), b"cut off")
    for one in kept:
        assert ledger.reserve(one, ROWS, charge(1), Budget(epsilon=100)) == one.run.encode()
    assert ledger.commit(request(1), b"once more") == b"once more"


def test_refusal_names_what_is_left_in_one_line_and_writes_nothing(ledger: Ledger) -> None:
    spend(ledger, ROWS, 95)
    before = ledger.verify()
    with pytest.raises(PrivacyError, match="at most 5 steps more with this noise and sample rate, 0 whole") as caught:
        ledger.reserve(request(2), ROWS, charge(6), Budget(epsilon=100))
    assert "\n" not in str(caught.value)
    assert ledger.verify() == before
    spend(ledger, ROWS, 5, 2)
    with pytest.raises(PrivacyError, match="at most 0 steps more"):
        ledger.reserve(request(3), ROWS, charge(1), Budget(epsilon=100))


def people(start: int, stop: int, edit: str = "") -> Dataset:
    return dataset([text + edit for text in words(start, stop)], [f"p{index}" for index in range(start, stop)])


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (dataset(reversed(words(0, 6))), True),
        (dataset(words(5, 12)), True),
        (dataset(words(0, 6), label="corrected"), True),
        (dataset([text.upper().replace(" ", "\n ") for text in words(0, 6)]), True),
        (identify("x.csv", [{"t": "row number 3", "new": "1"}], [Example("row number 3", label=1)]), True),
        (identify("x", [{"text": "row number 3", "label": "x"}], [Example("", messages=(("user", "hi"),))]), True),
        (dataset(words(6, 12)), False),
    ],
    ids=["reordered", "overlap", "label", "case and spacing", "columns", "task", "disjoint"],
)
def test_dataset_that_shares_a_record_shares_what_was_spent(ledger: Ledger, other: Dataset, shared: bool) -> None:
    spend(ledger, ROWS, 60)
    assert ledger.charges(other) == ([charge(60)] if shared else [])
    if shared:
        with pytest.raises(PrivacyError, match="at most 40 steps"):
            ledger.reserve(request(1, OTHER_RUN), other, charge(41), Budget(epsilon=100))
    spend(ledger, other, 40 if shared else 100, 1, OTHER_RUN)
    assert len(ledger.charges(ROWS)) == (2 if shared else 1)


def test_persons_are_found_again_when_every_word_was_edited(ledger: Ledger) -> None:
    spend(ledger, people(0, 5), 60)
    assert ledger.charges(people(4, 9, edit=" (edited)")) == [charge(60)]
    assert ledger.charges(people(5, 9)) == []


def test_spend_is_not_followed_through_a_third_dataset(ledger: Ledger) -> None:
    left, middle, right = (dataset(words(*ends)) for ends in ((0, 4), (3, 7), (6, 10)))
    for run, rows in enumerate((left, right, middle)):
        spend(ledger, rows, 30, 1, f"{run}" * 32)
    assert [len(ledger.charges(rows)) for rows in (left, middle, right)] == [2, 3, 2]


def test_fingerprint_depends_on_rows_and_not_on_their_order() -> None:
    assert dataset(words(0, 6)).fingerprint == dataset(reversed(words(0, 6))).fingerprint
    twice = dataset([*words(0, 6), "row number 0"])
    assert len({rows.fingerprint for rows in (ROWS, twice, dataset(words(0, 5)), dataset(words(0, 6), label="y"))}) == 4


def test_records_stand_in_the_file_only_as_keyed_digests(ledger: Ledger) -> None:
    spend(ledger, people(0, 5), 1)
    content = ledger.path.read_bytes()
    assert b"row number" not in content
    assert not any(handle in content for handle in people(0, 5).handles)


@pytest.mark.parametrize(
    "use",
    [
        lambda ledger: ledger.reserve(request(), ROWS, charge(), Budget(epsilon=100)),
        lambda ledger: ledger.commit(request(), b"update"),
        lambda ledger: ledger.expect_ready(),
        lambda ledger: ledger.charges(ROWS),
        lambda ledger: ledger.history(),
        lambda ledger: ledger.verify(),
    ],
    ids=["reserve", "commit", "expect_ready", "charges", "history", "verify"],
)
def test_missing_ledger_is_refused_and_not_made(ledger: Ledger, use: Callable[[Ledger], object]) -> None:
    spend(ledger, ROWS, 1)
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match=r"does not exist; .* new-ledger") as caught:
        use(ledger)
    assert "\n" not in str(caught.value)
    assert os.listdir(ledger.path.parent) == []


def test_ledger_is_made_once_and_never_over_another(ledger: Ledger) -> None:
    spend(ledger, ROWS, 1)
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyError, match="exists; expected a place that holds nothing"):
        ledger.create()
    assert ledger.path.read_bytes() == before
    assert os.listdir(ledger.path.parent) == [ledger.path.name]


@pytest.mark.parametrize(("left", "line"), [("ledger.db-journal", "left of an earlier"), ("ledger.db", "exists")])
def test_ledger_is_not_made_where_one_was(tmp_path: Path, left: str, line: str) -> None:
    (tmp_path / left).symlink_to(tmp_path / "moved away")
    with pytest.raises(PrivacyError, match=line):
        Ledger(tmp_path / "ledger.db").create()
    with pytest.raises(PrivacyError, match=r"cannot be made .*folder that exists"):
        Ledger(tmp_path / "nowhere" / "ledger.db").create()


def test_reading_writes_nothing(ledger: Ledger) -> None:
    assert ledger.charges(ROWS) == []
    assert ledger.history().entries == {}
    spend(ledger, ROWS, 1)
    before = ledger.path.read_bytes(), ledger.path.stat().st_mtime_ns
    ledger.charges(dataset(words(3, 9)))
    ledger.verify()
    assert (ledger.path.read_bytes(), ledger.path.stat().st_mtime_ns) == before
    assert os.listdir(ledger.path.parent) == [ledger.path.name]
