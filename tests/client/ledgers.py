"""Small datasets, requests and charges for tests of the ledger, and what its child processes run."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import client.ledger.spending
from client.ledger.dataset import Dataset, identify
from client.ledger.events import Charge
from client.ledger.ledger import Ledger, RoundRequest
from client.site_config import Budget
from common.atomic import write_atomic
from common.data.examples import Example
from common.errors import PrivacyError
from common.privacy.accounting import Segment

RUN, OTHER_RUN = "a" * 32, "b" * 32
BUDGET = Budget(epsilon=1000.0)


def dataset(texts: Iterable[str], persons: Sequence[str] | None = None, label: str = "x") -> Dataset:
    """Rows of one text each, of one person each where those are given."""
    texts = list(texts)
    owners: Sequence[str | None] = persons or [None] * len(texts)
    rows = [{"text": text, "label": label} for text in texts]
    return identify("rows.jsonl", rows, [Example(t, label=0, person=p) for t, p in zip(texts, owners, strict=True)])


def words(start: int, stop: int) -> list[str]:
    """Texts of rows number ``start`` to ``stop``."""
    return [f"row number {index}" for index in range(start, stop)]


def request(round_number: int = 1, run: str = RUN, asks: str = "an adapter") -> RoundRequest:
    """A request for a round."""
    return RoundRequest(run, round_number, hashlib.sha256(asks.encode()).hexdigest())


def charge(steps: int = 10, noise: float = 1.0, rate: float = 0.1, unit: str = "example") -> Charge:
    """What a round spends."""
    return Charge.model_validate({"unit": unit, "noise_multiplier": noise, "sample_rate": rate, "steps": steps})


def counted_steps(segments: Iterable[Segment], delta: float, accountant: str = "prv") -> float:
    """Stands in for ε where tests are about bookkeeping: the number of steps."""
    return float(sum(segment.steps for segment in segments))


def new_ledger(path: Path) -> Ledger:
    """A ledger in which nothing is spent."""
    made = Ledger(path)
    made.create()
    return made


def cut_off_write(source: Path, target: Path) -> None:
    """Leave ``target`` as a crash in the middle of a write leaves a ledger: pages of it changed, its journal hot."""
    left = target.with_name("left")
    with closing(sqlite3.connect(source, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")  # pages spill into the file before the commit
        writer.execute("BEGIN IMMEDIATE")
        for number in range(50):
            writer.execute("INSERT INTO payloads VALUES ('x', ?, zeroblob(20000))", (number,))
        shutil.copy(source, left)
        shutil.copy(f"{source}-journal", f"{left}-journal")
    left.rename(target)
    Path(f"{left}-journal").rename(f"{target}-journal")


def take_part(path: Path, outbox: Path, round_number: int, steps: int, run: str = RUN) -> bytes:
    """Reserve, "train", commit and release a round, as a site does; every sending leaves its own file."""
    ledger, asked = Ledger(path), request(round_number, run)
    released = ledger.reserve(asked, dataset(words(0, 5)), charge(steps), BUDGET)
    if released is None:
        noisy = secrets.token_bytes(512)  # no two trainings give the same update
        time.sleep(0.002)
        released = ledger.commit(asked, noisy)
    write_atomic(outbox / f"{run}-{round_number}-{secrets.token_hex(4)}", released)
    return released


def child(path: str, outbox: str, round_number: int, steps: int, run: str, start: Barrier | None) -> None:
    """Body of a child process: take part, or leave with status 3 where the ledger refuses."""
    client.ledger.spending.epsilon_spent = counted_steps  # type: ignore[attr-defined]
    if start is not None:
        start.wait()
    try:
        take_part(Path(path), Path(outbox), round_number, steps, run)
    except PrivacyError:
        os._exit(3)
