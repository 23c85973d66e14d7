"""A log that is put aside once it is large."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.processes import trim_log

LARGEST = 1000


def test_large_log_is_moved_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    with log.open("ab") as writer:
        writer.write(b"x" * (LARGEST + 1))
        writer.flush()
        trim_log(log, LARGEST)
        writer.write(b"more")
    assert log.read_bytes() == b"more"
    assert (tmp_path / "agent.log.1").stat().st_size == LARGEST + 1
    trim_log(log, LARGEST)
    assert log.read_bytes() == b"more"


def test_log_that_cannot_be_put_aside_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "test.log"
    log.touch()
    trim_log(log, LARGEST)
    os.truncate(log, LARGEST + 1)
    (tmp_path / "test.log.1").mkdir()
    trim_log(log, LARGEST)
    assert log.stat().st_size == 0
    assert "dropped" in caplog.text
    trim_log(tmp_path / "absent.log", LARGEST)
