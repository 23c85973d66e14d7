"""A SuperNode is killed in the middle of an upload: what its log says when, on a process that stands for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulations.local_federation.faults.kinds import FAULTS

SENDING, SENT = "Sending: train message (ID: 1)\n", "Sent successfully\n"
BEFORE = ["Sending: query message (ID: 0)\n", SENT]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as running:
        yield running
        running.kill()


@pytest.mark.parametrize("said", [[SENDING], [*BEFORE, SENDING], [SENT, SENDING, SENT, SENDING]])
def test_supernode_is_killed_in_an_upload_whatever_it_sent_before(
    process: subprocess.Popen[bytes], tmp_path: Path, said: list[str]
) -> None:
    log = tmp_path / "supernode.log"
    log.touch()
    made: Any = SimpleNamespace(
        sites={"north": SimpleNamespace(log=lambda name: log)}, site_component=lambda site, name: process.pid
    )
    over = time.monotonic() + 20.0
    place: Any = SimpleNamespace(submission=lambda: SimpleNamespace(over=time.monotonic() > over))

    def write() -> None:
        for text in said:
            time.sleep(0.05)
            with log.open("a", encoding="utf-8") as file:
                file.write(text)

    writer = threading.Thread(target=write)
    writer.start()
    struck = FAULTS["upload-supernode"].strike(made, place, "north")
    writer.join()
    assert struck
    assert process.wait(10) == -signal.SIGKILL
