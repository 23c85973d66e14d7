"""Real processes that leave their group, their session and their parent: none outlives the site."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from client.places import Places
from client.supervise.orphans import Orphans
from client.supervise.running import end
from client.supervise.supervisor import Supervisor
from tests.client.supervise.test_supervisor import (
    is_alive,
    is_running,
    run_until,
    shell,
    stubborn_supervisor,
    wait_for,
)

ESCAPES = "setsid sh -c 'trap \"\" TERM HUP; echo $$ >> escaped; exec sleep 600' & "

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux alone")


class Escaped:
    """The file in which processes that got away wrote their ids."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pids(self) -> list[int]:
        return [int(line) for line in self._file.read_text().split()] if self._file.exists() else []


@pytest.fixture
def escaped(tmp_path: Path) -> Iterator[Escaped]:
    """What wrote its id down is ended after the test in any case."""
    found = Escaped(tmp_path / "escaped")
    yield found
    for pid in found.pids():
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


def test_child_in_a_session_of_its_own_that_ignores_sigterm_is_gone_after_the_end(
    tmp_path: Path, escaped: Escaped
) -> None:
    supervisor = Supervisor([shell(tmp_path, "executor", f"{ESCAPES} wait")], tmp_path / "up.json")
    run_until(supervisor, lambda parts: len(escaped.pids()) == 1)
    assert not is_alive(escaped.pids()[0])


def test_child_whose_parent_ended_is_gone_after_the_end(tmp_path: Path, escaped: Escaped) -> None:
    supervisor = Supervisor([shell(tmp_path, "executor", f"({ESCAPES}); exec sleep 600")], tmp_path / "up.json")
    run_until(supervisor, lambda parts: len(escaped.pids()) == 1)
    assert not is_alive(escaped.pids()[0])


def test_what_a_component_left_is_gone_when_it_is_started_again_and_what_others_run_is_not(
    tmp_path: Path, escaped: Escaped
) -> None:
    alive = dict[int, bool]()
    child = tmp_path / "child"
    components = [
        shell(tmp_path, "agent", "setsid sleep 600 & echo $! > child; wait"),
        shell(tmp_path, "executor", f"{ESCAPES} while ! [ -s escaped ]; do sleep 0.1; done; exit 1"),
    ]

    def is_again(parts: dict[str, Any]) -> bool:
        if parts["executor"]["starts"] >= 2 and not alive and child.exists() and child.read_text():
            alive.update({pid: is_alive(pid) for pid in (escaped.pids()[0], int(child.read_text()))})
        return bool(alive)

    before = subprocess.Popen(["sleep", "600"])  # ours, and nothing to the supervisor
    try:
        run_until(Supervisor(components, tmp_path / "up.json"), is_again)
        assert before.poll() is None
    finally:
        before.kill()
        before.wait()
    assert list(alive.values()) == [False, True]
    assert not any(map(is_running, alive))


def test_orphan_that_ended_is_no_zombie_while_its_component_lives(tmp_path: Path, escaped: Escaped) -> None:
    script = "(sleep 0.5 & echo $! > escaped); exec sleep 600"
    found = run_until(
        Supervisor([shell(tmp_path, "agent", script)], tmp_path / "up.json"),
        lambda parts: bool(escaped.pids()) and not is_alive(escaped.pids()[0]),
    )
    assert found["agent"]["starts"] == 1


def test_supervisor_that_is_killed_takes_along_what_left_its_group(tmp_path: Path, escaped: Escaped) -> None:
    places = Places.beside(tmp_path / "site.yaml")
    with stubborn_supervisor(places, f"({ESCAPES}); exec sleep 600") as process:
        wait_for(escaped.pids)
        assert end(places, wait_s=0.5)
        assert process.wait() == -signal.SIGKILL
        wait_for(lambda: not is_running(escaped.pids()[0]))


def test_orphans_are_adopted_for_as_long_as_the_context_lasts(tmp_path: Path) -> None:
    def made_orphan() -> psutil.Process:
        subprocess.run(["sh", "-c", "(sleep 600 & echo $! > orphan)"], cwd=tmp_path, check=True)
        return psutil.Process(int((tmp_path / "orphan").read_text()))

    orphans = Orphans()
    with orphans:
        orphan = made_orphan()
        assert orphan.ppid() == os.getpid()
        orphans.kill(())
        assert not is_alive(orphan.pid)
    orphan = made_orphan()
    assert orphan.ppid() != os.getpid()
    orphan.kill()
