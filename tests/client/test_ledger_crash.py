"""Processes that are killed or race: spend is never lost, never refunded, never doubled."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import sqlite3
import statistics
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy
import pytest

from client.ledger.file import transaction
from client.ledger.ledger import Ledger
from tests.client.ledgers import BUDGET, RUN, child, new_ledger

KILLS = 200


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts real processes in milliseconds: one server imports everything once and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.client.ledgers"])
    return context


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    folder = tmp_path / "outbox"
    folder.mkdir()
    return folder


def start(
    processes: Any, path: Path, outbox: Path, number: int, steps: int = 1, run: str = RUN, gate: Any = None
) -> Any:
    process = processes.Process(target=child, args=(str(path), str(outbox), number, steps, run, gate))
    process.start()
    return process


def killed(process: BaseProcess, delay_s: float) -> bool:
    """Kill a process after a delay; False if it had ended by then."""
    process.join(delay_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def reserved(path: Path) -> set[tuple[str, int]]:
    """The rounds that are charged, after any half-written transaction was taken back; every entry is unique."""
    with transaction(path, write=True) as connection:
        rows = connection.execute(
            "SELECT json_extract(body, '$.run'), json_extract(body, '$.round') FROM events WHERE kind = 'reserved'"
        ).fetchall()
    assert len(set(rows)) == len(rows)
    return set(rows)


def duration_of_a_round(processes: Any, folder: Path) -> float:
    """Seconds from the start of a process to the end of its round, on this machine today; the median of five."""
    (folder / "outbox").mkdir(parents=True)
    new_ledger(folder / "ledger.db")
    seconds = []
    for number in range(1, 7):
        began = time.perf_counter()
        start(processes, folder / "ledger.db", folder / "outbox", number).join()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first one waits for the imports


@pytest.mark.slow
def test_ledger_survives_kills_at_any_moment(processes: Any, tmp_path: Path, outbox: Path) -> None:
    path, moments = new_ledger(tmp_path / "ledger.db").path, numpy.random.default_rng(20)
    longest = 1.1 * duration_of_a_round(processes, tmp_path / "warm-up")
    number, kills, before, phases = 1, 0, set[tuple[str, int]](), set[str]()
    while kills < KILLS:
        process = start(processes, path, outbox, number)
        if not killed(process, moments.uniform(0, longest)):
            assert process.exitcode == 0
            number += 1
            continue
        kills += 1
        now = reserved(path)
        assert before <= now
        before = now
        Ledger(path).verify()
        entry = Ledger(path).history().entries.get((RUN, number))
        phases.add("new" if entry is None else "reserved" if entry.committed is None else "committed")
    assert phases == {"new", "reserved", "committed"}
    history = Ledger(path).history()
    released: dict[tuple[str, int], set[str]] = {}
    for sent in outbox.iterdir():
        if not sent.name.startswith("."):
            run, round_number, _ = sent.name.split("-")
            released.setdefault((run, int(round_number)), set()).add(hashlib.sha256(sent.read_bytes()).hexdigest())
    assert number > 5
    assert released.keys() >= {(RUN, done) for done in range(1, number)}
    for key, payloads in released.items():
        entry = history.entries[key]
        assert entry.committed is not None
        assert payloads == {entry.committed.payload}
    assert sum(entry.reserved.charge.steps for entry in history.entries.values()) in (number - 1, number)


def test_processes_that_race_for_the_last_round_do_not_both_get_it(
    processes: Any, tmp_path: Path, outbox: Path
) -> None:
    path = new_ledger(tmp_path / "ledger.db").path
    start(processes, path, outbox, 1, steps=int(BUDGET.epsilon) - 10).join()
    for attempt in range(5):
        gate = processes.Barrier(3)
        rivals = [start(processes, path, outbox, attempt + 2, 10, f"{rival}" * 32, gate) for rival in range(3)]
        for process in rivals:
            process.join()
        codes = [process.exitcode for process in rivals]
        assert sorted(codes) == ([0, 3, 3] if attempt == 0 else [3, 3, 3])
    entries = Ledger(path).history().entries.values()
    assert sum(entry.reserved.charge.steps for entry in entries) == BUDGET.epsilon
    assert len(list(outbox.iterdir())) == 2


def test_processes_that_race_for_one_round_release_the_same_bytes(processes: Any, tmp_path: Path, outbox: Path) -> None:
    path, gate = new_ledger(tmp_path / "ledger.db").path, processes.Barrier(4)
    rivals = [start(processes, path, outbox, 1, gate=gate) for _ in range(4)]
    for process in rivals:
        process.join()
    assert [process.exitcode for process in rivals] == [0] * 4
    sent = [file.read_bytes() for file in outbox.iterdir()]
    assert len(sent) == 4
    assert len(set(sent)) == 1
    assert len(Ledger(path).history().entries) == 1


def test_lock_of_another_process_is_waited_for(processes: Any, tmp_path: Path, outbox: Path) -> None:
    path = new_ledger(tmp_path / "ledger.db").path
    start(processes, path, outbox, 1).join()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = start(processes, path, outbox, 2)
    time.sleep(0.2)
    assert waiting.exitcode is None
    holder.execute("ROLLBACK")
    holder.close()
    waiting.join()
    assert waiting.exitcode == 0
