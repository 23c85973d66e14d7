"""What a site keeps from round to round for itself (a personal adapter, a SCAFFOLD variate), durable and by round.

One SQLite file holds one state a row, for one real site or for all virtual sites of a run; a site's state is read when
the site trains, so that memory does not grow with their number.

- A state is written once for (run, site, name, round). What a round wrote is there whole or not at all, whatever
  moment a crash picks.
- :meth:`SiteStates.before` gives the state as the rounds before a round left it. A run resumed after round r trains
  round r + 1 again: it sees the states of round r, not those of the rounds that the crash took back, and what it writes
  replaces them.
- Of each state the newest two are kept: a coordinator is never more than one round behind its sites.
- A real site keeps states of the newest few runs: a coordinator must not fill its disk with runs. The id of a run whose
  states were dropped stays, so that the run is refused and does not start from nothing.

A real site's writes reach the disk one by one. The virtual sites of a run write hundreds in a round, so that theirs are
brought to disk together by :meth:`SiteStates.sync`, which the round loop calls before it checkpoints the round; a
killed process loses none of them, a power cut at most those of a round that was not checkpointed.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from common.errors import RunError
from common.tensors import Tensors

KEPT_ROUNDS = 2
KEPT_RUNS = 8
"""How many runs a real site keeps states of: those that last wrote one."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS states (
    run TEXT NOT NULL, site TEXT NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL, tensors BLOB NOT NULL,
    PRIMARY KEY (run, site, name, round)
) WITHOUT ROWID
"""
_RUNS = "CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID"
"""Every run that wrote a state, and the number of its last write among all."""
_NEWEST = "SELECT run FROM runs ORDER BY last DESC LIMIT ?"


class SiteStates:
    """A file of site states; processes and threads can share it.

    Args:
        path: the file; made, readable by its owner alone, when a state is first written.
        together: bring writes to disk at :meth:`sync` instead of one by one, for virtual sites.
        kept_runs: how many runs keep their states; None for all, for the virtual sites of one run.
    """

    def __init__(self, path: Path, *, together: bool = False, kept_runs: int | None = None) -> None:
        self._path, self._together, self._kept_runs = path, together, kept_runs
        self._held = threading.local()

    def before(self, run: str, site: str, name: str, round_number: int) -> Tensors | None:
        """Return a state as the rounds before ``round_number`` left it; None where they left none.

        Args:
            run: id of the run.
            site: name of the site.
            name: of the state, for instance "variate".
            round_number: the round about to be trained.

        Raises:
            RunError: if the file is damaged, or what the run kept was dropped after newer runs.
        """
        if not self._path.exists():
            return None
        with self._open() as connection:
            dropped = self._is_dropped(connection, run)
            found = connection.execute(
                "SELECT tensors FROM states WHERE run = ? AND site = ? AND name = ? AND round < ? "
                "ORDER BY round DESC LIMIT 1",
                (run, site, name, round_number),
            ).fetchone()
        if dropped:
            raise RunError(
                f"what this site kept of run {run} was dropped after newer runs; expected one of the {self._kept_runs} "
                "runs that last kept something. Start a new run."
            )
        if found is None:
            return None
        try:
            return dict(load(bytes(found[0])))
        except SafetensorError:
            raise self._damaged("a state is no safetensors") from None

    def write(
        self, run: str, site: str, round_number: int, states: Mapping[str, Tensors], after: int | None = None
    ) -> None:
        """Write what a site keeps of a round, all of ``states`` or none, durably.

        A round written before is replaced, and whatever stood of later rounds is dropped: the run went back. With
        ``after`` all rounds past that one are, since what they left counts for nothing.

        Raises:
            RunError: if the file is damaged or cannot be written.
        """
        packed = {name: save({key: value.contiguous() for key, value in own.items()}) for name, own in states.items()}
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for name, content in packed.items():
                key = (run, site, name)
                first = round_number if after is None else min(round_number, after + 1)
                connection.execute(
                    "DELETE FROM states WHERE run = ? AND site = ? AND name = ? AND round >= ?", (*key, first)
                )
                connection.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?)", (*key, round_number, content))
                connection.execute(
                    "DELETE FROM states WHERE run = ?1 AND site = ?2 AND name = ?3 AND round NOT IN (SELECT round "
                    "FROM states WHERE run = ?1 AND site = ?2 AND name = ?3 ORDER BY round DESC LIMIT ?4)",
                    (run, site, name, KEPT_ROUNDS),
                )
            if self._kept_runs is not None:
                connection.execute("INSERT OR IGNORE INTO runs SELECT DISTINCT run, 0 FROM states")  # of an older file
                connection.execute("INSERT OR REPLACE INTO runs SELECT ?, coalesce(max(last), 0) + 1 FROM runs", (run,))
                connection.execute(f"DELETE FROM states WHERE run NOT IN ({_NEWEST})", (self._kept_runs,))  # noqa: S608
            connection.execute("COMMIT")

    def sites(self, run: str, name: str) -> tuple[str, ...]:
        """Return the sites of a run that have a state of that name, sorted."""
        if not self._path.exists():
            return ()
        with self._open() as connection:
            rows = connection.execute(
                "SELECT DISTINCT site FROM states WHERE run = ? AND name = ? ORDER BY site", (run, name)
            ).fetchall()
        return tuple(site for (site,) in rows)

    def sync(self) -> None:
        """Bring what was written to disk.

        Raises:
            RunError: if another process is writing and does not end.
        """
        if not self._together or not self._path.exists():
            return
        with self._open() as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise RunError(
                f"site states in {self._path} are being written by another process; expected one run. Stop it."
            )

    def drop(self, run: str) -> None:
        """Forget every state of a run."""
        if not self._path.exists():
            return
        with self._open() as connection:
            connection.execute("DELETE FROM states WHERE run = ?", (run,))

    def _is_dropped(self, connection: sqlite3.Connection, run: str) -> bool:
        """Whether a run had states that newer runs pushed out."""
        if self._kept_runs is None:
            return False
        query = f"SELECT 1 FROM runs WHERE run = ? AND run NOT IN ({_NEWEST})"  # noqa: S608
        return connection.execute(query, (run, self._kept_runs)).fetchone() is not None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose commits are durable. What is not committed when it closes is undone."""
        try:
            if not self._together:
                with closing(self._connected()) as connection:
                    yield connection
                return
            # The last connection to close brings all to disk, so that this one stays open, in its process and thread.
            if getattr(self._held, "process", None) != os.getpid():
                self._held.connection, self._held.process = self._connected(), os.getpid()
            connection = self._held.connection
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise RunError(
                f"site states in {self._path} cannot be written ({error.strerror}); expected a writable folder."
            ) from None

    def _connected(self) -> sqlite3.Connection:
        if not self._path.exists():
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self._path, timeout=60.0, isolation_level=None)
        try:
            if self._together:
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if self._together else 'FULL'}")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA cache_size = -2048")
            connection.execute(_SCHEMA)
            if self._kept_runs is not None:
                connection.execute(_RUNS)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close this thread's connection, which brings what was written to disk."""
        if getattr(self._held, "process", None) == os.getpid():
            self._held.connection.close()
            self._held.process = None

    def _damaged(self, what: str) -> RunError:
        return RunError(
            f"site states in {self._path} cannot be used ({what}); expected what this run wrote. Restore the file, or "
            "start the run afresh."
        )
