"""The supervisor with real processes: what ends is started again, what runs is ended, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from client.places import Places
from client.supervise.components import Component
from client.supervise.running import end
from client.supervise.supervisor import Supervisor, pause_before, refusal_in

PATIENCE_S = 60.0
SAID = (
    "printf 'Exit Code: 305\\nFailed to initialize the connection to the SuperLink.\\n"
    "[code: 2004] Failed to activate SuperNode.\\n'; exit 1"
)


def shell(folder: Path, name: str, script: str) -> Component:
    command = ("/bin/sh", "-c", script)
    return Component(name, command, {"PATH": os.environ["PATH"]}, folder / f"{name}.log", folder)


def run_until(supervisor: Supervisor, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Run in this thread until a report is as wanted; the report."""
    ended, found = threading.Event(), list[dict[str, Any]]()

    def watch() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not (found and reached(found[-1]["components"])):
            found[:] = [supervisor.report()]
            time.sleep(0.02)
        ended.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    supervisor.run(ended)
    watcher.join()
    assert reached(found[-1]["components"])
    components: dict[str, Any] = found[-1]["components"]
    return components


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether a process runs that is no child of ours, and so is nothing to us once it is a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_ends_is_started_again_and_what_runs_is_ended(tmp_path: Path) -> None:
    components = [shell(tmp_path, "agent", "exec sleep 600"), shell(tmp_path, "executor", "echo one line; exit 3")]
    supervisor = Supervisor(components, tmp_path / "up.json")
    found = run_until(supervisor, lambda parts: parts["executor"]["starts"] >= 2)
    assert (found["agent"]["starts"], found["executor"]["last_exit"]) == (1, 3)
    assert not is_alive(found["agent"]["pid"])
    assert (tmp_path / "executor.log").read_text().startswith("one line\n")
    noted = json.loads((tmp_path / "up.json").read_text())
    assert [part["pid"] for part in noted["components"].values()] == [None, None]


def test_what_the_system_refuses_is_said_once_and_tried_again_while_the_rest_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("client.supervise.supervisor._LOG_EVERY_S", 0.0)
    monkeypatch.setattr("client.supervise.supervisor.LARGEST_LOG", 0)
    (tmp_path / "agent.log").write_text("long")
    (tmp_path / "agent.log.1").mkdir()  # as on a full disk, the log has nowhere to go
    later = tmp_path / "later"
    supervisor = Supervisor(
        [
            replace(shell(tmp_path, "supernode", "exit 1"), user="nobody-of-this-name"),
            replace(shell(tmp_path, "executor", "exec sleep 600"), folder=later),
            shell(tmp_path, "agent", "exec sleep 600"),
        ],
        later / "up.json",
    )
    places = ["supernode", "executor", "agent.log cannot be put aside and is dropped", str(later / "up.json")]

    def is_up(parts: dict[str, Any]) -> bool:
        if len(caplog.messages) == len(places):
            later.mkdir(exist_ok=True)
        return bool(parts["executor"]["starts"] and (later / "up.json").exists())

    found = run_until(supervisor, is_up)
    assert [found[name]["starts"] for name in ("supernode", "executor", "agent")] == [0, 1, 1]
    assert [message.partition(": ")[0] for message in caplog.messages] == places
    assert set(json.loads((later / "up.json").read_text())["components"]) == {"supernode", "executor", "agent"}


def test_refusal_of_flower_is_told_from_another_end(tmp_path: Path) -> None:
    supervisor = Supervisor([shell(tmp_path, "supernode", SAID)], tmp_path / "up.json")
    found = run_until(supervisor, lambda parts: parts["supernode"]["last_exit"] is not None)
    assert found["supernode"]["refusal"] == "[code: 2004] Failed to activate SuperNode."


def test_reason_of_a_refusal_is_one_printable_line() -> None:
    said = b"x\nExit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
    assert refusal_in(said + b"\x1b[1m bad\x07 thing\nmore") == "[1m bad thing"
    assert refusal_in(said + b"y" * 1000) == "y" * 160
    assert refusal_in(said) == "refused"
    assert refusal_in(b"Exit Code: 1") is None


def test_component_that_does_not_end_when_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.supervise.supervisor.STOP_S", 0.2)
    stubborn = shell(tmp_path, "agent", "trap '' TERM; echo up; while :; do sleep 1; done")
    supervisor = Supervisor([stubborn], tmp_path / "up.json")

    def is_up(parts: dict[str, Any]) -> bool:
        return parts["agent"]["pid"] is not None and "up" in stubborn.log.read_text()

    found = run_until(supervisor, is_up)
    assert not is_alive(found["agent"]["pid"])
    assert supervisor.report()["components"]["agent"]["last_exit"] == -signal.SIGKILL


def test_what_a_component_started_and_left_behind_is_killed_at_the_end(tmp_path: Path) -> None:
    script = "(trap '' TERM; exec sleep 600) & echo $! > child; wait"
    supervisor = Supervisor([shell(tmp_path, "executor", script)], tmp_path / "up.json")
    child = tmp_path / "child"
    run_until(supervisor, lambda parts: child.exists() and bool(child.read_text().strip()))
    wait_for(lambda: None if is_running(int(child.read_text())) else 1)


@contextmanager
def stubborn_supervisor(places: Places, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor that ignores SIGTERM, in a process of its own, with one component, the shell's ``script``."""
    code = textwrap.dedent(
        """
        import signal, sys, threading
        from pathlib import Path
        from client.places import Places
        from client.supervise.running import only_one
        from client.supervise.supervisor import Supervisor
        from tests.client.supervise.test_supervisor import shell
        places = Places.beside(Path(sys.argv[1]))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with only_one(places):
            Supervisor([shell(places.folder, "executor", sys.argv[2])], places.running).run(threading.Event())
        """
    )
    command = [sys.executable, "-c", code, places.site_config, script]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_supervisor_that_does_not_end_is_killed_with_all_it_runs(tmp_path: Path) -> None:
    places, child = Places.beside(tmp_path / "site.yaml"), tmp_path / "child"
    with stubborn_supervisor(places, "sleep 600 & echo $! > child; wait") as process:
        wait_for(lambda: (child.exists() and bool(child.read_text().strip())) or None)
        assert end(places, wait_s=0.5)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
        wait_for(lambda: None if is_running(int(child.read_text())) else 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system ends orphans on Linux alone")
def test_killed_supervisor_leaves_nothing_running(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, threading
        from pathlib import Path
        from client.supervise.supervisor import Supervisor
        from tests.client.supervise.test_supervisor import shell
        folder = Path(sys.argv[1])
        Supervisor([shell(folder, "agent", "exec sleep 600")], folder / "up.json").run(threading.Event())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=Path(__file__).parents[3])
    try:
        pid = wait_for(lambda: _noted_pid(tmp_path / "up.json"))
        assert is_alive(pid)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not is_alive(pid))


def _noted_pid(note: Path) -> int | None:
    if not note.exists():
        return None
    pid: int | None = json.loads(note.read_text())["components"]["agent"]["pid"]
    return pid


def wait_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 4 * PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_pauses_double_to_a_minute_and_a_refusal_waits_five_seconds() -> None:
    assert [pause_before(n, False) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pause_before(10**6, False) == 60
    assert {pause_before(n, True) for n in range(1, 100)} == {5}
