"""Flower's own commands on the coordinator's SuperLink: the one place that calls ``flwr``.

They talk to the SuperLink on the loopback address, which needs no credentials there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from common.errors import ConfigError, RunError
from server.state_folder import StateFolder

CONNECTION = "coordinator"
BIN = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 120
PROJECT = "pyproject.toml"
KEY_IN_USE = "Public key already in use"
"""What Flower says of a key that was registered before."""

SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.5"),
}


def flower_environment(state: StateFolder) -> dict[str, str]:
    """Return the environment of Flower's processes: no telemetry, no update checks, its home in the state folder."""
    own = {"FLWR_HOME": str(state.flower_home), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    return {**os.environ, **SETTINGS, **own}


class KeyInUseError(RunError):
    """The SuperLink has registered a key before, be it that it has turned it away since."""


class Flower:
    """Commands to the SuperLink of a state folder.

    Args:
        state: the state folder.
        port: of the SuperLink.
    """

    def __init__(self, state: StateFolder, port: int) -> None:
        self._state = state
        self.address = f"127.0.0.1:{port}"

    def register(self, public_key: str, name: str) -> int:
        """Let the holder of a key connect as ``name`` and return the id of its node.

        Raises:
            KeyInUseError: if the key was registered before.
        """
        file = self._state.flower_home / "register.pub"
        file.write_text(public_key + "\n", encoding="ascii")
        return int(self._call("supernode", "register", file, CONNECTION, "--name", name)["node-id"])

    def unregister(self, node_id: int) -> None:
        """Turn a node away from now on."""
        self._call("supernode", "unregister", str(node_id), CONNECTION)

    def nodes(self) -> dict[int, str]:
        """Return the status of each node by id: registered, online, offline or unregistered."""
        listed = self._call("supernode", "ls", CONNECTION, "--verbose")["nodes"]
        return {int(node["node-id"]): str(node["status"]) for node in listed}

    def run(self, app: Path, run_config: Mapping[str, str | int]) -> int:
        """Submit a run of the app in a folder and return Flower's id of it.

        Raises:
            ConfigError: if the folder is no app.
        """
        file, staged = self._state.flower_home / "run.toml", self._state.flower_home / "app"
        file.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        stage_app(app, staged)
        return int(self._call("run", staged, CONNECTION, "--run-config", file)["run-id"])

    def runs(self) -> dict[int, str]:
        """Return the status of each run by id, such as ``running`` or ``finished:failed``."""
        return {int(run["run-id"]): str(run["status"]) for run in self._call("ls", CONNECTION)["runs"]}

    def stop(self, run_id: int) -> None:
        """End a run."""
        self._call("stop", str(run_id), CONNECTION)

    def _call(self, *arguments: str | Path) -> dict[str, Any]:
        """Run a ``flwr`` command and return the JSON that it prints.

        Raises:
            RunError: if it fails, with Flower's own first line.
        """
        self._configure()
        command = [str(BIN / "flwr"), *map(str, arguments), "--format", "json"]
        try:
            done = subprocess.run(
                command, cwd=self._state.flower_home, env=flower_environment(self._state), timeout=COMMAND_TIMEOUT_S,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(
                f"flwr {arguments[0]} did not answer within {COMMAND_TIMEOUT_S} s; expected the SuperLink at "
                f"{self.address}. Look at its log."
            ) from None
        except FileNotFoundError:
            raise ConfigError(f"{BIN}/flwr is missing; expected Flower in this environment. Install fedtune.") from None
        answer = _last_object(done.stdout)
        if done.returncode != 0 or not answer.get("success"):
            said = str(answer.get("error-message") or done.stderr or done.stdout).strip()
            kind = KeyInUseError if KEY_IN_USE in said else RunError
            raise kind(f"flwr {arguments[0]} failed ({' '.join(said.split())[:300]}); expected success.")
        return answer

    def _configure(self) -> None:
        link = {"address": self.address, "root-certificates": str(self._state.ca_certificate)}
        text = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: link}})
        file = self._state.flower_home / "config.toml"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def stage_app(app: Path, staged: Path) -> None:
    """Copy what an app's ``fab-include`` names, and its pyproject.toml, to a folder that holds nothing else.

    Flower matches every file below an app's folder against its patterns, one by one: with a virtual environment and run
    folders in it, that takes longer than all the rest of a submission.

    Raises:
        ConfigError: if the folder is no app that says what is in its bundle.
    """
    try:
        project = tomllib.loads((app / PROJECT).read_text(encoding="utf-8"))
        included = [str(pattern).lstrip("/") for pattern in project["tool"]["flwr"]["app"]["fab-include"]]
    except (OSError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{app / PROJECT} does not say what is in a run's bundle (tool.flwr.app.fab-include); expected fedtune's "
            "own. Run the coordinator from a clone of the repository."
        ) from None
    if staged.exists():
        shutil.rmtree(staged)
    for file in {app / PROJECT, *(found for pattern in included for found in app.glob(pattern) if found.is_file())}:
        copied = staged / file.relative_to(app)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def _last_object(text: str) -> dict[str, Any]:
    """Return the JSON object in what a command printed, {} where there is none."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
