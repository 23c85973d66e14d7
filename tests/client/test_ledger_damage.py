"""Whatever was done to the file is found and named, and nothing is reserved on it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import client.ledger.file
import client.ledger.spending
from client.ledger.chain import link_hash
from client.ledger.file import SCHEMA
from client.ledger.ledger import Ledger
from client.site_config import Budget
from common.errors import PrivacyError
from tests.client.ledgers import charge, counted_steps, cut_off_write, dataset, new_ledger, request, words

ROWS, BUDGET = dataset(words(0, 4)), Budget(epsilon=100)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger of six events: opened, dataset, and two rounds reserved and committed."""
    monkeypatch.setattr(client.ledger.spending, "epsilon_spent", counted_steps)
    made = new_ledger(tmp_path / "ledger.db")
    for number in (1, 2):
        made.reserve(request(number), ROWS, charge(), BUDGET)
        made.commit(request(number), b"update")
    made.verify()
    return made


def tamper(ledger: Ledger, *statements: str) -> None:
    """Run SQL with all triggers dropped, and put them back."""
    triggers = [sql for sql in SCHEMA.values() if sql.startswith("CREATE TRIGGER")]
    with closing(sqlite3.connect(ledger.path)) as connection:
        for sql in triggers:
            connection.execute(f"DROP TRIGGER {sql.split()[2]}")
        for statement in statements:
            connection.execute(statement)
        for sql in triggers:
            connection.execute(sql)
        connection.commit()


@pytest.mark.parametrize(
    ("statements", "named"),
    [
        (["""UPDATE events SET body = replace(body, '"steps":10', '"steps":1') WHERE seq = 3"""], "event 3 does not"),
        (["UPDATE events SET kind = 'opened' WHERE seq = 5"], "event 5 does not follow"),
        (["DELETE FROM events WHERE seq = 4"], "event 4 is missing"),
        (["DELETE FROM events WHERE seq = 6"], "event 6 is missing"),
        (["DELETE FROM events WHERE seq > 2"], "event 3 is missing: the last one was 6"),
        (["DELETE FROM events WHERE seq = 3", "UPDATE events SET seq = seq - 1 WHERE seq > 3"], "event 3 does not"),
        (
            ["UPDATE events SET seq = 99 WHERE seq = 4", "UPDATE events SET seq = 4 WHERE seq = 5",
             "UPDATE events SET seq = 5 WHERE seq = 99"],
            "event 4 does not follow",
        ),
        (["INSERT INTO events SELECT 7, kind, body, hash FROM events WHERE seq = 2"], "event 7 does not follow"),
        (["DELETE FROM head"], "last event is unknown"),
        (["UPDATE head SET seq = 4"], "not the last one"),
        (["UPDATE secret SET key = zeroblob(32)"], "key is not the one"),
        (["DELETE FROM events"], "last event is unknown"),
    ],
)  # fmt: skip
def test_change_of_the_chain_is_named_and_nothing_is_reserved(
    ledger: Ledger, statements: list[str], named: str
) -> None:
    tamper(ledger, *statements)
    for attempt in (
        lambda: ledger.reserve(request(3), ROWS, charge(), BUDGET),
        lambda: ledger.commit(request(2), b"update"),
        lambda: ledger.history(),
        lambda: ledger.verify(),
    ):
        with pytest.raises(PrivacyError, match=named) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM members WHERE handle = (SELECT min(handle) FROM members)", "records noted for the dataset"),
        ("UPDATE payloads SET payload = x'00'", "not those committed"),
        ("INSERT INTO payloads VALUES ('f', 1, x'00')", "not those committed"),
        ("DROP INDEX one_of_a_round", "one_of_a_round was altered"),
        ("CREATE TABLE more (x)", "more was altered, put in"),
    ],
)
def test_change_beside_the_chain_is_named(ledger: Ledger, statement: str, named: str) -> None:
    tamper(ledger, statement)
    with pytest.raises(PrivacyError, match=named):
        ledger.verify()


def test_dropped_trigger_is_named(ledger: Ledger) -> None:
    with closing(sqlite3.connect(ledger.path)) as connection:
        connection.execute("DROP TRIGGER events_no_delete")
    with pytest.raises(PrivacyError, match="events_no_delete was altered"):
        ledger.verify()


def test_altered_bytes_are_never_sent(ledger: Ledger) -> None:
    tamper(ledger, "UPDATE payloads SET payload = x'00'")
    with pytest.raises(PrivacyError, match="not those committed"):
        ledger.reserve(request(2), ROWS, charge(), BUDGET)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET kind = 'opened' WHERE seq = 3",
        "DELETE FROM events WHERE seq = 6",
        "INSERT OR REPLACE INTO events SELECT seq, kind, '{}', hash FROM events WHERE seq = 3",
        "INSERT INTO events SELECT 9, kind, body, hash FROM events WHERE seq = 3",
        "INSERT INTO events SELECT 7, kind, body, hash FROM events WHERE seq = 3",
        "DELETE FROM members",
        "UPDATE secret SET key = x'00'",
    ],
)
def test_file_itself_refuses_to_be_changed(ledger: Ledger, statement: str) -> None:
    with closing(sqlite3.connect(ledger.path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    ledger.verify()


def test_rewritten_chain_that_plays_wrong_is_named(ledger: Ledger) -> None:
    with closing(sqlite3.connect(ledger.path)) as connection:
        seq, previous = connection.execute("SELECT seq, hash FROM head").fetchone()
        body = connection.execute("SELECT body FROM events WHERE seq = 4").fetchone()[0].replace('round":1', 'round":9')
        made = link_hash(previous, seq + 1, "committed", body)
        connection.execute("INSERT INTO events VALUES (?, 'committed', ?, ?)", (seq + 1, body, made))
        connection.execute("UPDATE head SET seq = ?, hash = ?", (seq + 1, made))
        connection.commit()
    with pytest.raises(PrivacyError, match="event 7 commits round 9"):
        ledger.history()


def _newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")


def _foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _scribbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * len(content[4096:])
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _gone(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_newer, "schema version 2; expected 1"),
        (_foreign, "is no ledger"),
        (lambda path: path.write_bytes(b""), "is no ledger"),
        (lambda path: path.write_bytes(b"something else" * 100), "is no SQLite file"),
        (_cut, "damaged|broken"),
        (_scribbled, "damaged"),
        (_folder, "cannot be opened"),
        (_gone, "does not exist; expected the one"),
    ],
)
def test_unusable_file_is_one_line_and_nothing_is_reserved(
    ledger: Ledger, spoil: Callable[[Path], object], line: str
) -> None:
    spoil(ledger.path)
    with pytest.raises(PrivacyError, match=line) as caught:
        ledger.reserve(request(3), ROWS, charge(), BUDGET)
    assert "\n" not in str(caught.value)
    assert str(ledger.path) in str(caught.value)


def test_locked_file_is_one_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.ledger.file, "LOCK_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(PrivacyError, match="locked by another process"):
            ledger.reserve(request(3), ROWS, charge(), BUDGET)


def test_read_only_file_is_one_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = client.ledger.file._connect  # file modes do not stop the superuser, who may run this test
    monkeypatch.setattr(client.ledger.file, "_connect", lambda path, mode: connect(path, "ro"))
    with pytest.raises(PrivacyError, match="cannot be written"):
        ledger.reserve(request(3), ROWS, charge(), BUDGET)


def test_write_cut_off_by_a_crash_is_taken_back_by_the_next_one(ledger: Ledger, tmp_path: Path) -> None:
    copy = Ledger(tmp_path / "copy.db")
    cut_off_write(ledger.path, copy.path)
    with pytest.raises(PrivacyError, match="in the middle of a write"):
        copy.history()
    copy.expect_ready()
    copy.verify()
    assert copy.history() == ledger.history()
