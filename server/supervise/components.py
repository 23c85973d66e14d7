"""The coordinator's processes: what each is started with.

=============  ===========================================================================
``superlink``  Flower's SuperLink, on the loopback address
``executor``   Flower's SuperExec, which starts a ServerApp for each run
``gateway``    what sites connect to
``caretaker``  registers sites at the SuperLink, submits runs and submits anew those that died
=============  ===========================================================================
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.flower_commands import BIN, flower_environment
from server.server_config import ServerConfig
from server.state_folder import StateFolder

STATE_VARIABLE = "FEDTUNE_COORDINATOR"
"""Environment variable that tells a ServerApp where the state folder is: nothing of it travels in a run config."""


@dataclass(frozen=True)
class Component:
    """A process that is kept alive.

    Attributes:
        name: of the component and its log.
        command: program and arguments.
        environment: all of it.
        folder: the working directory.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path


def coordinator_components(state: StateFolder, config: ServerConfig) -> dict[str, Component]:
    """Return the components by name, in the order in which they start."""
    address = f"127.0.0.1:{config.superlink_port}"
    authority, secret = str(state.ca_certificate), str(state.executor_secret)
    flower = {**flower_environment(state), STATE_VARIABLE: str(state.path)}
    commands: dict[str, tuple[str, ...]] = {
        "superlink": (
            str(BIN / "flower-superlink"),
            "--ssl-ca-certfile", authority,
            "--ssl-certfile", str(state.certificate("superlink")),
            "--ssl-keyfile", str(state.key("superlink")),
            "--enable-supernode-auth",
            "--database", str(state.database),
            "--host", "127.0.0.1", "--port", str(config.superlink_port),
            "--isolation", "process", "--superexec-auth-secret-file", secret,
            "--disable-runtime-dependency-installation",
        ),
        "executor": (
            str(BIN / "flower-superexec"),
            "--runtime-api-address", address, "--root-certificates", authority,
            "--superexec-auth-secret-file", secret,
        ),
        "gateway": (sys.executable, "-m", "server.gateway.serve", str(state.path)),
        "caretaker": (sys.executable, "-m", "server.supervise.caretaker", str(state.path)),
    }  # fmt: skip
    # Ours start in the state folder too; a source tree that the command was run from stays importable.
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {**flower, "PYTHONPATH": path}
    return {
        name: Component(name, command, flower if name in ("superlink", "executor") else ours, state.path)
        for name, command in commands.items()
    }
