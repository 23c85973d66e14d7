"""A real agent process: killed in the middle of a round, it spends that round once and releases it once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.agent.channel import ask, status_of
from common.errors import RunError
from common.wire import SiteDescription, TrainReply
from tests.client.real_sites import PRIVATE, RUN, RealSite

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 600.0
"""How long a process may take on a busy machine; nothing waits this long on an idle one."""

pytestmark = pytest.mark.slow


class OverTheSocket:
    """Answers as the ClientApp's forwarding function does: by asking the agent's socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def answer(self, kind: str, config: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return ask(self._socket, kind, (config, header, payload), wait_s=PATIENCE_S)


class Agent:
    """The agent of a site, as a process of its own."""

    def __init__(self, site: RealSite, socket: Path) -> None:
        self._site, self.socket = site, socket
        self._log = socket.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command: list[str | Path] = [
            sys.executable, "-m", "client.cli", "agent", self._site.path, "--socket", self.socket,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    def wait(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            try:
                return status_of(self.socket, wait_s=5.0)
            except RunError:
                assert time.monotonic() < deadline

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def words_of(value: Any) -> Iterator[str]:
    """Every key and value of what is nested in whatever way."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from words_of(part)
    else:
        yield str(value)


@pytest.fixture
def agent(make_site: Callable[..., RealSite], tmp_path: Path) -> Iterator[Agent]:
    site = make_site(PRIVATE | {"noise_multiplier": 30.0}, training={"local_steps": 150})
    agent = Agent(site, tmp_path / "run" / "agent.sock")
    agent.socket.parent.mkdir()
    agent.socket.parent.chmod(0o2750)
    site.resident = OverTheSocket(agent.socket)  # type: ignore[assignment]
    agent.site = site  # type: ignore[attr-defined]
    agent.start()
    agent.wait()
    yield agent
    agent.stop()


def test_round_of_a_killed_agent_is_charged_once_and_answered_by_the_next(agent: Agent) -> None:
    site: RealSite = agent.site  # type: ignore[attr-defined]
    assert isinstance(site.describe(), SiteDescription)
    found: list[tuple[Any, bytes]] = []
    asking = threading.Thread(target=lambda: found.append(site.train(1)))
    asking.start()
    deadline = time.monotonic() + PATIENCE_S
    while not site.ledger.history().entries:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    agent.end(signal.SIGKILL)
    (entry,) = site.ledger.history().entries.values()
    assert entry.committed is None, "the round had ended before the agent was killed"
    agent.start()
    asking.join(PATIENCE_S)
    (reply, update) = found[0]
    assert isinstance(reply, TrainReply)
    history = site.ledger.history()
    assert list(history.entries) == [(RUN, 1)]
    committed = history.entries[RUN, 1]
    assert committed.reserved == entry.reserved
    assert committed.committed is not None
    assert site.train(1)[1] == update
    assert list(site.ledger.history().entries) == [(RUN, 1)]
    site.ledger.verify()


def test_model_and_rows_are_loaded_once_for_all_rounds(agent: Agent) -> None:
    site: RealSite = agent.site  # type: ignore[attr-defined]
    site.describe()
    for number in (1, 2):
        assert isinstance(site.train(number)[0], TrainReply)
    status = status_of(agent.socket, wait_s=30.0)
    assert (status["model_loads"], status["data_loads"], status["rounds"]) == (1, 1, 2)
    assert status["last_round"]["round"] == 2
    told = status | {"pid": None}  # which may be any number
    assert not {"rows", "examples", "persons", str(len(site.rows))} & set(words_of(told))
    assert agent.end(signal.SIGTERM) == 0
    assert os.listdir(agent.socket.parent) == ["agent.log"] or not agent.socket.exists()
