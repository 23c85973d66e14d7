"""A coordinator as real processes: SuperLink, executor, gateway and caretaker; who gets in, and what comes back."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import RunError
from common.processes import is_alive
from server.authority import new_authority
from server.enrolment import UNREGISTERED
from server.flower_commands import BIN, Flower, KeyInUseError, flower_environment
from server.state_folder import StateFolder
from server.supervise.processes import end_families
from server.supervise.service import component_states, listens, running_service
from tests.server.coordinator import LOOPBACK, coordinator, free_port, site_key

WAIT_S = 600.0
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@dataclass
class Live:
    """A coordinator that is up."""

    state: StateFolder

    def command(self, *arguments: str) -> Any:
        """Run a ``fedtune-server`` command and return the JSON that it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", *arguments, "--state", str(self.state.path), "--json"],
            cwd=ROOT, env=self.environment(), timeout=WAIT_S, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def environment(self) -> dict[str, str]:
        """The environment of its processes, with this source tree."""
        return {**flower_environment(self.state), "PYTHONPATH": str(ROOT)}

    def answers(self) -> bool:
        """Whether SuperLink and gateway can be reached."""
        config = self.state.config()
        return listens(config.superlink_port) and listens(config.port)

    def connection(self, name: str) -> str | None:
        """What Flower says of a site's connection."""
        listed = {site["name"]: site for site in self.command("sites", "list") if site["state"] != "revoked"}
        connection: str | None = listed[name]["connection"]
        return connection

    @contextmanager
    def node(
        self, key: bytes, folder: Path, authority: Path | None = None, address: str | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A site's SuperNode that connects through the gateway, or to another address."""
        file = folder / f"site-{free_port()}.key"
        file.write_bytes(key)
        file.chmod(0o600)
        command: list[str | Path] = [
            BIN / "flower-supernode", "--root-certificates", authority or self.state.ca_certificate,
            "--superlink", address or self.state.config().address, "--auth-supernode-private-key", file,
            "--isolation", "process", "--port", str(free_port()), "--max-retries", "2",
        ]  # fmt: skip
        env = {**self.environment(), "FLWR_HOME": str(folder)}
        log = (folder / "node.log").open("ab")
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        try:
            yield process
        finally:
            end_families([process.pid])
            process.wait()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with coordinator() as state:
        made = Live(state)
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "up", "--state", str(state.path)],
            cwd=ROOT, env=made.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(made.answers)
            yield made
            known = running_service(state)
            process.send_signal(signal.SIGTERM)
            process.wait(WAIT_S)
            assert known is not None
            assert not any(is_alive(entry["process"]) for entry in known["components"].values())
        finally:
            end_families([process.pid])
            process.wait()


def test_enrolled_site_gets_in_and_is_turned_away_once_revoked(live: Live, tmp_path: Path) -> None:
    private, public = site_key()
    (tmp_path / "site.pub").write_text(public)
    assert live.command("sites", "add", "revoked", str(tmp_path / "site.pub"))["state"] == "enrolled"
    with live.node(private, tmp_path):
        wait_until(lambda: live.connection("revoked") == "online")
        assert live.command("sites", "revoke", "revoked")["state"] == "revoked"
        nodes = {site["name"]: site["connection"] for site in live.command("sites", "list")}
        assert nodes["revoked"] != "online"
    with live.node(private, tmp_path) as again:
        assert again.wait(WAIT_S) != 0


def test_superlink_refuses_a_key_and_a_node_the_second_time_as_the_registry_expects(live: Live) -> None:
    flower, key = Flower(live.state, live.state.config().superlink_port), site_key()[1]
    node = flower.register(key, "twice")
    with pytest.raises(KeyInUseError):
        flower.register(key, "twice")
    flower.unregister(node)
    assert flower.nodes()[node] == UNREGISTERED
    with pytest.raises(RunError):
        flower.unregister(node)
    with pytest.raises(KeyInUseError):
        flower.register(key, "twice")


def test_key_that_nobody_enrolled_does_not_get_in(live: Live, tmp_path: Path) -> None:
    with live.node(site_key()[0], tmp_path) as process:
        assert process.wait(WAIT_S) != 0
    assert live.answers()


def test_site_does_not_speak_to_a_gateway_of_another_authority(live: Live, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    other.write_bytes(new_authority("clinics", datetime.now(UTC)).certificate.public_bytes(Encoding.PEM))
    private, public = site_key()
    (tmp_path / "site.pub").write_text(public)
    live.command("sites", "add", "misled", str(tmp_path / "site.pub"))
    with live.node(private, tmp_path, other) as process:
        assert process.wait(WAIT_S) != 0
    assert live.connection("misled") == "registered"


@pytest.mark.parametrize(
    "path", ["control/list-runs", "control/start-run", "runtime/acquire-task", "fleet/../control/list-runs"]
)
def test_outside_reaches_the_fleet_api_alone(live: Live, path: str) -> None:
    context = ssl.create_default_context(cafile=str(live.state.ca_certificate))
    with httpx.Client(verify=context, trust_env=False, timeout=WAIT_S) as client:
        answer = client.post(f"https://{live.state.config().address}/v1/{path}")
    assert answer.status_code == 404


def test_task_is_not_given_out_on_loopback_without_the_secret(live: Live) -> None:
    context = ssl.create_default_context(cafile=str(live.state.ca_certificate))
    with httpx.Client(verify=context, trust_env=False, timeout=WAIT_S) as client:
        answer = client.post(f"https://{LOOPBACK}:{live.state.config().superlink_port}/v1/runtime/acquire-task")
    assert answer.status_code >= 400


@pytest.mark.parametrize("name", ["gateway", "caretaker", "executor", "superlink"])
def test_component_that_is_killed_comes_back_by_itself_alone(live: Live, name: str) -> None:
    before = component_states(live.state)
    os.kill(before[name]["pid"], signal.SIGKILL)
    wait_until(lambda: component_states(live.state)[name]["restarts"] == before[name]["restarts"] + 1)
    wait_until(live.answers)
    after = component_states(live.state)
    assert after[name]["pid"] != before[name]["pid"]
    assert all(after[other]["pid"] == before[other]["pid"] for other in after if other != name)


def test_second_coordinator_on_the_same_state_is_refused(live: Live) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "up", "--state", str(live.state.path)],
        cwd=ROOT, env=live.environment(), timeout=WAIT_S, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert all(part["running"] for part in component_states(live.state).values())
