"""The ledger's file: an SQLite database that only ever grows, and one line for each way it cannot be used.

Events are append-only: triggers abort UPDATE, DELETE and REPLACE, and a unique index holds one reservation and one
commit for a round. A transaction is on the disk when it returns (rollback journal, ``synchronous=EXTRA``, which syncs
the folder too), and takes the write lock before it reads (``BEGIN IMMEDIATE``), so that two processes never decide on
the same balance. The file stays where its process can lock it: on a local disk, not on a network share.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from common.atomic import sync_folder
from common.errors import PrivacyError

APPLICATION_ID = 0x66744C31
SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 60.0
"""How long a process waits for another one's transaction, which may hold a computation of ε."""

_NEVER = "BEGIN SELECT RAISE(ABORT, 'a ledger is never changed'); END"
SCHEMA = {
    "secret": "CREATE TABLE secret (one INTEGER PRIMARY KEY CHECK (one = 1), key BLOB NOT NULL)",
    "head": "CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, hash TEXT NOT NULL)",
    "events": (
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)"
    ),
    "members": (
        "CREATE TABLE members (handle BLOB NOT NULL, dataset INTEGER NOT NULL, PRIMARY KEY (handle, dataset)) "
        "WITHOUT ROWID"
    ),
    "payloads": (
        "CREATE TABLE payloads (run TEXT NOT NULL, round INTEGER NOT NULL, payload BLOB NOT NULL, "
        "PRIMARY KEY (run, round))"
    ),
    "one_of_a_round": (
        "CREATE UNIQUE INDEX one_of_a_round ON events "
        "(kind, json_extract(body, '$.run'), json_extract(body, '$.round')) WHERE kind IN ('reserved', 'committed')"
    ),
    "events_no_replace": (
        "CREATE TRIGGER events_no_replace BEFORE INSERT ON events "
        "WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM events) "
        "BEGIN SELECT RAISE(ABORT, 'a ledger is never changed'); END"
    ),
    **{
        f"{table}_no_{verb.lower()}": f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} {_NEVER}"
        for table in ("events", "members", "secret")
        for verb in ("UPDATE", "DELETE")
    },
}
"""Statement of every table, index and trigger, by its name."""

_LINES = {
    sqlite3.SQLITE_BUSY: f"is locked by another process for {LOCK_TIMEOUT_S:g} s; expected a turn. End that process",
    sqlite3.SQLITE_LOCKED: "is locked; expected a turn. End the process that holds it",
    sqlite3.SQLITE_READONLY: "cannot be written; expected file and folder writable by this user. Change their mode",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; expected a file that this user may read and write. Check the path",
    sqlite3.SQLITE_PERM: "cannot be opened; expected a file that this user may read and write. Check its mode",
    sqlite3.SQLITE_FULL: "cannot be written: the disk is full; expected room. Make room",
    sqlite3.SQLITE_NOTADB: "is no SQLite file; expected a ledger. Restore it, or correct 'ledger' in the site config",
    sqlite3.SQLITE_CORRUPT: "is damaged; expected a sound SQLite file. Restore it from a copy",
    sqlite3.SQLITE_CONSTRAINT: "refuses to change what it holds; expected new events only. Find out who changed it",
}


@contextmanager
def transaction(path: Path, *, write: bool) -> Iterator[sqlite3.Connection]:
    """Open a ledger file for one transaction: committed at the end, rolled back on any exception.

    Args:
        path: an existing ledger.
        write: False opens it read-only; what a crash left half-written then stays and is refused.

    Raises:
        PrivacyError: in one line, for a file that cannot be used.
    """
    try:
        with closing(_connect(path, "rw" if write else "ro")) as connection:
            if write:
                connection.execute("PRAGMA journal_mode = DELETE").fetchone()
                connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            _expect_ledger(connection, path)
            yield connection
            connection.execute("COMMIT")  # closing without it rolls back
    except sqlite3.Error as error:
        raise PrivacyError(_line(error, path, write=write)) from None


@contextmanager
def new_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Make a ledger file: whole, or not at all; what stands there already stays.

    Yields:
        A connection to the new file, with tables, in a transaction that is committed at the end.

    Raises:
        PrivacyError: in one line, if something stands there or it cannot be made there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(_connect(temporary, "rw")) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for statement in SCHEMA.values():
                connection.execute(statement)
            yield connection
            connection.execute("COMMIT")
        os.link(temporary, path)  # fails where a file stands, which another process may have made meanwhile
        sync_folder(path.parent)
    except FileExistsError:
        raise PrivacyError(
            f"{path} exists; expected a place that holds nothing. A ledger is never replaced: use that one, or name "
            "another place for other data."
        ) from None
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise PrivacyError(
            f"ledger {path} cannot be made ({what}); expected a folder that exists and can be written. Make it."
        ) from None
    except sqlite3.Error as error:
        raise PrivacyError(_line(error, path, write=True)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None)


def _expect_ledger(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise PrivacyError(f"{path} is no ledger; expected one. Correct 'ledger' in the site config, or restore it.")
    if version != SCHEMA_VERSION:
        raise PrivacyError(
            f"ledger {path} has schema version {version}; expected {SCHEMA_VERSION}. "
            "Another version of fedtune wrote it: install that one."
        )


def _line(error: sqlite3.Error, path: Path, *, write: bool) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if not write and primary == sqlite3.SQLITE_READONLY:
        return (
            f"ledger {path} was left in the middle of a write; expected a finished one. The site takes that write "
            "back when a coordinator next asks it to take part."
        )
    known = _LINES.get(primary) if primary is not None else None
    if known is None:
        known = f"cannot be used ({str(error)[:100]}); expected a sound file. Check the disk, or restore it from a copy"
    return f"ledger {path} {known}. Nothing is trained without it."
