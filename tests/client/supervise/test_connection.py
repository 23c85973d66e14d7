"""What ``status`` and ``check`` say of a site's connection: told by the answers to the SuperNode that runs."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.heartbeat import HeartbeatSender
from typer.testing import CliRunner

from client.agent.server import AgentServer
from client.checks.finding import Finding
from client.checks.site import check_site
from client.cli import app
from client.places import Places
from client.site_config import load_site_config
from client.supervise import heartbeats
from client.supervise.connection import CONNECTING_S, HEARD_S, Connection, connection_of, last_answer, note_of
from client.supervise.heartbeats import AnswerNote, keep_beating, note_answers
from client.supervise.running import only_one
from common.processes import identity_of
from tests.client.real_sites import RealSite

MakeSite = Callable[..., RealSite]
REFUSAL = "[code: 2004] Failed to activate SuperNode."


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.beside(tmp_path / "site.yaml")


def note(places: Places, pid: int, ago_s: float = 0.0) -> None:
    path, when = note_of(places), time.time() - ago_s
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(pid))
    os.utime(path, (when, when))


def runs(pid: int | None, **changes: Any) -> dict[str, Any]:
    """What a supervisor says whose SuperNode is this process."""
    part = {"pid": pid, "user": None, "starts": 1, "last_exit": None, "refusal": None} | changes
    return {**identity_of(os.getpid()), "components": {"supernode": part}}


def told(places: Places, running: dict[str, Any] | None) -> Connection:
    connection = connection_of(places, running)
    assert connection is not None
    return connection


@pytest.fixture
def another() -> Iterator[int]:
    """A process that has just started."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def test_nothing_is_said_of_a_site_that_up_does_not_run(places: Places) -> None:
    assert connection_of(places, None) is None


@pytest.mark.parametrize(
    ("ago_s", "state"),
    [(0.0, "connected"), (HEARD_S - 5, "connected"), (HEARD_S + 5, "not connected"), (-HEARD_S - 5, "not connected")],
)
def test_answer_holds_for_two_heartbeats(places: Places, ago_s: float, state: str) -> None:
    note(places, os.getpid(), ago_s)
    connection = told(places, runs(os.getpid()))
    assert connection.state == state
    assert connection.answered == pytest.approx(time.time() - ago_s, abs=5)
    assert ("no answer since 2" in connection.said) == (state == "not connected")


def test_answer_to_the_process_before_is_none(places: Places, another: int) -> None:
    note(places, os.getpid())
    assert last_answer(note_of(places), os.getpid()) is not None
    assert told(places, runs(another)).state == "connecting"
    again = told(places, runs(another, starts=7, last_exit=1))  # ends before it is answered, again and again
    assert (again.state, "7 starts, last exit status 1" in again.said) == ("not connected", True)


def test_supernode_that_lives_without_an_answer_is_not_connected(
    places: Places, another: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(places, runs(another)).state == "connecting"
    now = time.time()
    monkeypatch.setattr("client.supervise.connection.time.time", lambda: now + CONNECTING_S + 5)
    connection = told(places, runs(another))
    assert (connection.state, connection.said[:13]) == ("not connected", "no answer yet")


def test_supernode_that_does_not_run_is_not_connected(places: Places) -> None:
    note(places, os.getpid())
    assert told(places, runs(None, starts=0)) == Connection("not connected", "the SuperNode has not started yet")
    ended = told(places, runs(None, starts=3, last_exit=1))
    assert (ended.state, "3 starts, last exit status 1" in ended.said) == ("not connected", True)
    refused = told(places, runs(None, refusal=REFUSAL))
    assert (refused.state, refused.said) == ("not connected", f"no connection: {REFUSAL}")


def test_refusal_of_an_earlier_start_stands_until_an_answer(places: Places) -> None:
    assert told(places, runs(os.getpid(), refusal=REFUSAL)).state == "not connected"
    note(places, os.getpid())
    assert told(places, runs(os.getpid(), refusal=REFUSAL)).state == "connected"


def test_link_or_pipe_in_the_place_of_the_note_is_not_read(places: Places, tmp_path: Path) -> None:
    note(places, os.getpid())
    path = note_of(places)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert last_answer(path, os.getpid()) is None
    path.unlink()
    os.mkfifo(path)
    assert last_answer(path, os.getpid()) is None


class Client:
    """Stands for Flower's."""

    taken = True

    def ActivateNode(self, request: str) -> str:  # noqa: N802 - Flower's name
        if request == "refused":
            raise ConnectionError
        return request

    def SendNodeHeartbeat(self, request: str) -> SimpleNamespace:  # noqa: N802 - Flower's name
        return SimpleNamespace(success=self.taken)


def test_note_is_written_where_the_coordinator_lets_in_or_takes_a_heartbeat(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flower(Client):
        """One to be patched."""

    monkeypatch.setattr(heartbeats, "import_module", lambda name: SimpleNamespace(FleetHttpClient=Flower))
    monkeypatch.setenv("FLWR_HOME", str(note_of(places).parent))
    note_answers()
    client = Flower()
    with pytest.raises(ConnectionError):
        client.ActivateNode("refused")
    assert not note_of(places).exists()
    assert client.ActivateNode("asked") == "asked"
    assert last_answer(note_of(places), os.getpid()) is not None
    assert note_of(places).read_text() == str(os.getpid())
    note_of(places).unlink()
    Flower.taken = False
    assert not client.SendNodeHeartbeat("beat").success
    assert not note_of(places).exists()
    Flower.taken = True
    client.SendNodeHeartbeat("beat")
    assert note_of(places).exists()


def test_full_disk_ends_no_heartbeat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    refused = AnswerNote(tmp_path / "file" / "answered")
    refused.write()
    refused.write()
    assert len(caplog.messages) == 1


class Agent:
    def answer(self, kind: str, config: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return header, payload

    def status(self) -> dict[str, Any]:
        now = time.time()
        return {
            "doing": "idle", "since": now, "started": now, "messages": 0, "rounds": 0, "refusals": 0,
            "model_loads": 0, "data_loads": 0, "last_round": None,
        }  # fmt: skip


@contextmanager
def up(site: RealSite, running: dict[str, Any]) -> Iterator[Places]:
    """A site whose agent answers and whose supervisor says what it runs."""
    places = Places.beside(site.path)
    server = AgentServer(Agent(), places.socket(load_site_config(site.path)))
    server.start()
    try:
        with only_one(places):
            places.running.write_text(json.dumps(running))
            yield places
    finally:
        server.stop(0)


def status(site: RealSite, *options: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["status", str(site.path), *options])
    return done.exit_code, done.stdout


def at_coordinator(site: RealSite) -> Finding:
    found = check_site(Places.beside(site.path), load_site_config(site.path), None)
    return next(finding for finding in found if finding.what == "key at the coordinator")


def test_status_and_check_pass_a_site_that_is_answered_alone(make_site: MakeSite, another: int) -> None:
    site = make_site()
    site.write(data="nothing.jsonl")  # which spares the checks that train
    with up(site, runs(another)) as places:
        exit_status, shown = status(site)
        assert (exit_status, "coordinator: connecting, no answer yet" in shown) == (1, True)
        assert at_coordinator(site).outcome == "note"
        note(places, another)
        exit_status, shown = status(site)
        assert (exit_status, "coordinator: connected, last answer" in shown) == (0, True)
        assert json.loads(status(site, "--json")[1])["connection"]["state"] == "connected"
        assert at_coordinator(site).outcome == "pass"
        note(places, another, ago_s=2 * HEARD_S)
        exit_status, shown = status(site)
        assert (exit_status, "coordinator: not connected, no answer since" in shown) == (1, True)
        assert at_coordinator(site).outcome == "fail"


def test_status_and_check_fail_a_supernode_that_waits_to_be_started_again(make_site: MakeSite) -> None:
    site = make_site()
    site.write(data="nothing.jsonl")
    with up(site, runs(None, starts=4, last_exit=1)):
        assert status(site)[0] == 1
        finding = at_coordinator(site)
        assert (finding.outcome, "4 starts" in finding.found, "site.pub" in finding.remedy) == ("fail", True, True)


def test_heartbeats_go_on_after_an_answer_that_flower_does_not_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeartbeatSender, "_heartbeat", HeartbeatSender._heartbeat)  # put back afterwards
    keep_beating()
    answers: list[bool | Exception] = [RuntimeError("not recognised"), False, ValueError("a busy database"), True]
    beaten = threading.Event()

    def beat() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer:
            beaten.set()
        return answer

    sender = HeartbeatSender(beat)
    sender.start()
    assert beaten.wait(60)
    assert sender.is_running
    sender.stop()
