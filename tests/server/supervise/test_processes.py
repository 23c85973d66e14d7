"""Processes that are kept alive and ended with all that they started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from common.errors import ConfigError, RunError
from server.authority import create_coordinator
from server.state_folder import StateFolder, locked
from server.supervise.components import Component, coordinator_components
from server.supervise.processes import (
    FIRST_PAUSE_S,
    LOG_BYTES,
    LONGEST_PAUSE_S,
    STEADY_S,
    Supervised,
    end_families,
    identity_of,
    is_alive,
    trim_log,
)
from server.supervise.service import _end_left_over, running_service, serve, stop_service
from server.supervise.units import TARGET, unit_files, write_units
from tests.server.coordinator import coordinator, server_config

WAIT_S = 60.0
SLEEPER = (sys.executable, "-c", "import time; time.sleep(600)")
PARENT = (
    sys.executable, "-c",
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True); print(p.pid, flush=True); time.sleep(600)",
)  # fmt: skip
TALKER = (
    sys.executable, "-c",
    "import time\nfor _ in range(6000):\n    print('word', flush=True)\n    time.sleep(0.1)",
)  # fmt: skip
STUBBORN = (
    sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)  # fmt: skip


def component(command: tuple[str, ...], folder: Path) -> Component:
    return Component("test", command, dict(os.environ), folder)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_process_that_is_killed_is_started_again_after_a_growing_pause(tmp_path: Path) -> None:
    clock = Clock()
    supervised = Supervised(component(SLEEPER, tmp_path), tmp_path / "log", clock)
    try:
        assert supervised.tend()
        assert not supervised.tend()
        pause_s = FIRST_PAUSE_S
        for number in range(1, 4):
            before = supervised.identity()
            assert before is not None
            os.kill(before["pid"], signal.SIGKILL)
            wait_until(lambda: supervised.identity() is None)
            pause_s *= 2
            assert not supervised.tend()
            clock.now_s += pause_s - 0.01
            assert not supervised.tend()
            clock.now_s += 0.02
            assert supervised.tend()
            assert supervised.identity() != before
            assert supervised.restarts == number
    finally:
        supervised.end()


def test_process_that_ran_steadily_is_started_again_at_once(tmp_path: Path) -> None:
    clock = Clock()
    supervised = Supervised(component(SLEEPER, tmp_path), tmp_path / "log", clock)
    try:
        supervised.tend()
        identity = supervised.identity()
        assert identity is not None
        clock.now_s += STEADY_S
        os.kill(identity["pid"], signal.SIGKILL)
        wait_until(lambda: supervised.identity() is None)
        assert supervised.tend()
    finally:
        supervised.end()


def test_pause_is_bounded(tmp_path: Path) -> None:
    clock = Clock()
    supervised = Supervised(component((sys.executable, "-c", ""), tmp_path), tmp_path / "log", clock)
    for _ in range(12):
        assert supervised.tend()
        wait_until(lambda: supervised.identity() is None)
        supervised.tend()
        clock.now_s += LONGEST_PAUSE_S + 0.1
    supervised.end()


def test_end_ends_what_a_process_started_in_a_session_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    supervised = Supervised(component(PARENT, tmp_path), log)
    supervised.tend()
    wait_until(lambda: log.read_text().strip().isdigit())
    child = identity_of(int(log.read_text()))
    supervised.end()
    assert not is_alive(child)
    assert supervised.identity() is None


def test_process_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    supervised = Supervised(component(STUBBORN, tmp_path), log)
    supervised.tend()
    wait_until(lambda: log.read_text().strip() == "up")
    identity = supervised.identity()
    assert identity is not None
    end_families([identity["pid"]], seconds=0.2)
    assert not is_alive(identity)
    supervised.end()


def test_large_log_is_put_aside_while_its_process_runs_on(tmp_path: Path) -> None:
    log = tmp_path / "test.log"
    supervised = Supervised(component(TALKER, tmp_path), log)
    supervised.tend()
    try:
        wait_until(lambda: log.read_bytes().startswith(b"word"))
        identity = supervised.identity()
        assert not supervised.tend()
        assert not (tmp_path / "test.log.1").exists()
        os.truncate(log, LOG_BYTES + 1000)
        assert not supervised.tend()
        assert (tmp_path / "test.log.1").stat().st_size >= LOG_BYTES + 1000
        wait_until(lambda: log.read_bytes().startswith(b"word"))
        assert log.stat().st_size < LOG_BYTES
        assert supervised.identity() == identity
    finally:
        supervised.end()


def test_log_that_cannot_be_put_aside_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "test.log"
    log.touch()
    trim_log(log)
    os.truncate(log, LOG_BYTES + 1)
    (tmp_path / "test.log.1").mkdir()
    trim_log(log)
    assert log.stat().st_size == 0
    assert "dropped" in caplog.text
    trim_log(tmp_path / "absent.log")


def test_number_of_a_process_that_was_used_again_is_not_mistaken() -> None:
    own = identity_of(os.getpid())
    assert is_alive(own)
    assert not is_alive({**own, "created": own["created"] - 1})
    assert not is_alive(None)


def test_lock_is_held_by_one_and_goes_with_its_holder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", wait=False),
        pytest.raises(RunError, match="in use"),
        locked(tmp_path / "lock", wait=False, what="the coordinator"),
    ):
        pytest.fail("two hold it")
    with locked(tmp_path / "lock", wait=False):
        pass


def test_what_a_killed_coordinator_left_is_ended_and_nothing_else() -> None:
    with coordinator() as state:
        left, other = psutil.Popen(SLEEPER), psutil.Popen(SLEEPER)
        try:
            service = {**identity_of(os.getpid()), "created": 1.0}  # dead: no process of this number began then
            entries = {
                "superlink": {"process": identity_of(left.pid), "restarts": 0},
                "gateway": {"process": {**identity_of(other.pid), "created": 1.0}, "restarts": 0},
            }
            state.up.write_text(json.dumps({"service": service, "components": entries}))
            assert running_service(state) is None
            ends = identity_of(left.pid)
            _end_left_over(state)
            assert not is_alive(ends)
            assert is_alive(identity_of(other.pid))
            assert not state.up.exists()
        finally:
            end_families([left.pid, other.pid])


def test_unknown_component_is_refused_with_those_there_are() -> None:
    with coordinator() as state, pytest.raises(ConfigError, match="superlink, executor, gateway, caretaker"):
        serve(state, ["superlnk"])


def test_stop_where_nothing_runs_says_so() -> None:
    with coordinator() as state:
        assert not stop_service(state)


def test_coordinator_that_does_not_end_is_killed_and_its_processes_ended() -> None:
    with coordinator() as state:
        service, part = psutil.Popen(STUBBORN, stdout=subprocess.PIPE), psutil.Popen(SLEEPER)
        try:
            service.stdout.readline()
            entries = {"gateway": {"process": identity_of(part.pid), "restarts": 0}}
            state.up.write_text(json.dumps({"service": identity_of(service.pid), "components": entries}))
            ends = [identity_of(service.pid), identity_of(part.pid)]
            assert stop_service(state, wait_s=0.2)
            assert not any(map(is_alive, ends))
            assert not state.up.exists()
        finally:
            end_families([service.pid, part.pid])
            service.stdout.close()


def test_coordinator_whose_status_nobody_takes_has_ended_all_the_same() -> None:
    with coordinator() as state:
        service = psutil.Popen(SLEEPER)  # ours, so that it is a zombie to the process that ends it
        try:
            state.up.write_text(json.dumps({"service": identity_of(service.pid), "components": {}}))
            command = [sys.executable, "-m", "server.cli", "down", "--state", str(state.path)]
            subprocess.run(command, timeout=WAIT_S, check=True, capture_output=True)
            assert service.status() == psutil.STATUS_ZOMBIE
        finally:
            end_families([service.pid])
            service.wait()


def test_service_ends_its_components_on_sigterm() -> None:
    with coordinator() as state:
        seen: dict[str, object] = {}

        def ask() -> None:
            wait_until(lambda: running_service(state) is not None)
            seen.update(running_service(state) or {})
            os.kill(os.getpid(), signal.SIGTERM)

        asker = threading.Thread(target=ask)
        asker.start()
        serve(state, ["gateway"])
        asker.join(WAIT_S)
        components = seen["components"]
        assert isinstance(components, dict)
        assert list(components) == ["gateway"]
        assert not is_alive(components["gateway"]["process"])
        assert not state.up.exists()


def test_superlink_is_started_behind_every_guard() -> None:
    with coordinator() as state:
        known = coordinator_components(state, state.config())
        superlink, executor = known["superlink"].command, known["executor"].command
        for wanted in ("--enable-supernode-auth", "--disable-runtime-dependency-installation"):
            assert wanted in superlink
        assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
        assert superlink[superlink.index("--isolation") + 1] == "process"
        assert "--insecure" not in superlink + executor
        for command in (superlink, executor):
            assert command[command.index("--superexec-auth-secret-file") + 1] == str(state.executor_secret)
        secret = state.executor_secret.read_text()
        assert not any(secret in part for each in known.values() for part in each.command)
        for each in known.values():
            assert each.environment["FLWR_TELEMETRY_ENABLED"] == "0"
            assert each.environment["FLWR_HOME"] == str(state.flower_home)


def test_units_restart_for_ever_and_name_their_user(tmp_path: Path) -> None:
    with coordinator() as state:
        units = unit_files(state, "fed")
        assert set(units) == {
            TARGET,
            *(f"fedtune-{name}.service" for name in coordinator_components(state, state.config())),
        }
        for name, text in units.items():
            if name == TARGET:
                continue
            for line in ("User=fed", "Restart=always", "StartLimitIntervalSec=0", "NoNewPrivileges=yes", "UMask=0077"):
                assert line in text.splitlines()
            assert state.executor_secret.read_text() not in text
        assert {path.name for path in write_units(state, "fed", tmp_path)} == set(units)
        with pytest.raises(ConfigError, match="no folder"):
            write_units(state, "fed", tmp_path / "absent")


def test_unit_escapes_what_systemd_would_replace(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="a%b c") as folder:
        state: StateFolder = create_coordinator(Path(folder) / "c", server_config())
        text = unit_files(state, "fed")["fedtune-gateway.service"]
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert "a%%b c" in start
    assert "%b" not in start.replace("%%", "")
