"""An open ledger: its events checked and read, and what may be added to it.

Every opening checks the whole chain; :meth:`Store.expect_whole` checks the rest of the file as well.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from client.ledger.chain import START, Link, find_break, link_hash
from client.ledger.events import Event, Opened, from_body, kind_of, to_body
from client.ledger.file import SCHEMA
from client.ledger.history import History, read_history
from common.errors import PrivacyError

KEPT_RELEASES = 8
"""How many releases a ledger keeps the bytes of, all runs together: whoever asks for rounds must not fill the disk."""


class Store:
    """A ledger within a transaction.

    Args:
        connection: in a transaction on a ledger file.
        path: of the file, for errors.

    Attributes:
        history: what its events say.
        head: number and hash of the last event.
        key: of the keyed digests of records and persons.

    Raises:
        PrivacyError: if the chain is broken.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db, self._path = connection, path
        links = [Link(*row) for row in self._db.execute("SELECT seq, kind, body, hash FROM events ORDER BY seq")]
        head = self._one("SELECT seq, hash FROM head")
        wrong = find_break(links, head)
        if wrong is not None or head is None:
            raise self._broken(str(wrong))
        self.head: tuple[int, str] = head
        events = [(link.seq, self._read(link)) for link in links]
        history = read_history(events)
        if isinstance(history, str):
            raise self._broken(history)
        self.history: History = history
        self.key = self._key(events[0][1])

    def append(self, event: Event) -> int:
        """Add an event to the chain and return its number."""
        self.head = append_event(self._db, self.head, event)
        return self.head[0]

    def datasets_with(self, members: Iterable[bytes]) -> tuple[int, ...]:
        """Return the datasets that hold any of ``members`` (keyed digests)."""
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS asked (handle BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("DELETE FROM asked")
        self._db.executemany("INSERT INTO asked VALUES (?)", ((member,) for member in members))
        rows = self._db.execute("SELECT DISTINCT dataset FROM members WHERE handle IN (SELECT handle FROM asked)")
        return tuple(sorted(number for (number,) in rows))

    def add_members(self, dataset: int, members: Iterable[bytes]) -> None:
        """Note the keyed digests of a dataset's records and persons."""
        self._db.executemany("INSERT INTO members VALUES (?, ?)", ((member, dataset) for member in members))

    def payload(self, run: str, round_number: int) -> bytes | None:
        """Return the released bytes of a round, or None where there are none or they were dropped.

        Raises:
            PrivacyError: if they are not those that were committed.
        """
        found = self._one("SELECT payload FROM payloads WHERE run = ? AND round = ?", (run, round_number))
        if found is None:
            return None
        entry = self.history.entries.get((run, round_number))
        if entry is None or entry.committed is None or _sha256(found[0]) != entry.committed.payload:
            raise self._broken(f"the bytes kept for round {round_number} of run {run} are not those committed")
        return bytes(found[0])

    def keep_payload(self, run: str, round_number: int, payload: bytes) -> None:
        """Keep the released bytes of a round; drop those of the run's earlier ones, and all but the newest of all."""
        self._db.execute("INSERT INTO payloads VALUES (?, ?, ?)", (run, round_number, payload))
        self._db.execute("DELETE FROM payloads WHERE run = ? AND round < ?", (run, round_number))
        self._db.execute(  # a new row's id is beyond all that are there
            "DELETE FROM payloads WHERE rowid NOT IN (SELECT rowid FROM payloads ORDER BY rowid DESC LIMIT ?)",
            (KEPT_RELEASES,),
        )

    def expect_whole(self) -> None:
        """Check what an opening does not: pages, tables and triggers, noted records, kept bytes.

        Raises:
            PrivacyError: naming what is wrong.
        """
        pages = self._one("PRAGMA integrity_check")
        if pages != ("ok",):
            raise self._broken(f"its pages are damaged ({str(pages)[:80]})")
        found = dict(self._db.execute("SELECT name, sql FROM main.sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
        for name in sorted(SCHEMA.keys() | found.keys()):
            if found.get(name) != SCHEMA.get(name):
                raise self._broken(f"{name} was altered, put in or taken out")
        for number, seen in self.history.datasets.items():
            rows = self._db.execute("SELECT handle FROM members WHERE dataset = ? ORDER BY handle", (number,))
            if digest_of_members(bytes(handle) for (handle,) in rows) != seen.members:
                raise self._broken(f"the records noted for the dataset of event {number} are not those it had")
        for run, round_number in self._db.execute("SELECT run, round FROM payloads").fetchall():
            self.payload(run, round_number)

    def _read(self, link: Link) -> Event:
        event = from_body(link.kind, link.body)
        if event is None:
            raise self._broken(f"event {link.seq} cannot be read")
        return event

    def _key(self, first: Event) -> bytes:
        found = self._one("SELECT key FROM secret")
        if found is None or not isinstance(first, Opened) or _sha256(found[0]) != first.key_digest:
            raise self._broken("its key is not the one it was made with")
        return bytes(found[0])

    def _one(self, query: str, values: tuple[object, ...] = ()) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
        return row

    def _broken(self, what: str) -> PrivacyError:
        return PrivacyError(
            f"ledger {self._path} is broken: {what}; expected an unbroken chain. Nothing is trained on it: find out "
            "who changed it and restore it from a copy."
        )


def start_chain(connection: sqlite3.Connection, key: bytes, time: str) -> None:
    """Write key and first event into a new file."""
    connection.execute("INSERT INTO secret VALUES (1, ?)", (key,))
    append_event(connection, (0, START), Opened(key_digest=_sha256(key), time=time))


def append_event(connection: sqlite3.Connection, head: tuple[int, str], event: Event) -> tuple[int, str]:
    """Add an event after ``head`` and return the new head."""
    kind, body, seq = kind_of(event), to_body(event), head[0] + 1
    hashed = link_hash(head[1], seq, kind, body)
    connection.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (seq, kind, body, hashed))
    connection.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?)", (seq, hashed))
    return seq, hashed


def digest_of_members(members: Iterable[bytes]) -> str:
    """Return one SHA-256 over keyed digests in ascending order."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(member)
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
