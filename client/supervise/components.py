"""The three processes of a site, as commands: agent, SuperNode, executor.

=============  ==========================================================  ============================================
component      reads                                                       is reached by
=============  ==========================================================  ============================================
agent          data, base model, policy, ledger                            the executor's group, on a Unix socket
supernode      the site's key, CA certificate, its secret                  the executor, on loopback, with the secret
executor       its copy of the secret; runs the coordinator's ClientApp    nobody
=============  ==========================================================  ============================================

Run as three users they cannot read each other's files; as one user nothing but the code of the ClientApp keeps it from
the data, and that code is the coordinator's.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from client.places import Places
from client.site_config import SiteConfig
from common.atomic import write_atomic
from common.errors import ConfigError
from common.flower_keys import AGENT_SOCKET
from common.kit import Kit

RUNTIME_PORT = 9094
"""Flower's port for executors, on loopback."""
SECRET_BYTES = 32
CHUNK_BYTES = 1 << 18
"""Bytes of an update that travel, and are sent again, as one: two take 30 s at 140 kbit/s."""
_LOOPBACK = "127.0.0.1"
_PASSED_ON = ("LANG", "LC_ALL", "TZ", "PYTHONPATH", "TMPDIR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""What of the environment a component gets. Not all: the executor's is that of the coordinator's code."""
_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1"),
    # Of an update. Flower gives the upload of a chunk 30 s, with two under way, and begins it anew when it fails; its
    # own 5 MiB would never arrive over a link of 1 Mbit/s.
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
    "NO_PROXY": f"{_LOOPBACK},localhost",
    "no_proxy": f"{_LOOPBACK},localhost",
}
_PROXIES = ("HTTPS_PROXY", "https_proxy")


@dataclass(frozen=True)
class Component:
    """One process of a site.

    Attributes:
        name: agent, supernode or executor.
        command: what is run.
        environment: all of its environment.
        log: where its output goes.
        folder: its working folder, which it alone may read.
        user: whom it runs as; None for whoever starts it.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    folder: Path
    user: str | None = None


def components_of(places: Places, site_config: SiteConfig, kit: Kit, port: int) -> tuple[Component, ...]:
    """Return the components of a site.

    Args:
        places: where its files are.
        site_config: the site's.
        kit: the enrolled one.
        port: for the executor's calls to the SuperNode, on loopback.

    Raises:
        ConfigError: for a socket's path that Flower's node config cannot carry.
    """
    commands = {
        "agent": agent_command(places),
        "supernode": supernode_command(
            kit, places.private_key, places.ca_certificate, places.secret("supernode"), places.socket(site_config), port
        ),
        "executor": executor_command(places.secret("executor"), port),
    }
    users = site_config.users.model_dump() if site_config.users is not None and os.geteuid() == 0 else {}
    return tuple(
        Component(
            name, command, environment(name, places.own_folder(name)), places.log(name), places.own_folder(name),
            users.get(name),
        )
        for name, command in commands.items()
    )  # fmt: skip


def agent_command(places: Places) -> tuple[str, ...]:
    """Return the command of the agent. -P: no module is taken from the working folder."""
    return (sys.executable, "-P", "-m", "client.cli", "agent", str(places.site_config))


def supernode_command(
    kit: Kit, key: Path | str, ca_certificate: Path | str, secret: Path | str, agent_socket: Path, port: int
) -> tuple[str, ...]:
    """Return the command of the SuperNode.

    Raises:
        ConfigError: for a socket's path that Flower's node config cannot carry.
    """
    if any(character in str(agent_socket) for character in "\"'\\\n"):
        raise ConfigError(f"the agent's socket {agent_socket} has a quote or backslash; expected none in its path.")
    return (
        sys.executable, "-P", "-m", "client.supervise.supernode",
        "--superlink", kit.address, "--root-certificates", str(ca_certificate),
        "--auth-supernode-private-key", str(key), "--isolation", "process", "--superexec-auth-secret-file", str(secret),
        "--host", _LOOPBACK, "--port", str(port), "--node-config", f'{AGENT_SOCKET}="{agent_socket}"',
    )  # fmt: skip


def executor_command(secret: Path | str, port: int) -> tuple[str, ...]:
    """Return the command of Flower's executor. Its calls stay on loopback, without TLS but with the secret."""
    return (
        str(Path(sys.executable).parent / "flower-superexec"),
        "--runtime-api-address", f"{_LOOPBACK}:{port}", "--insecure",
        "--superexec-auth-secret-file", str(secret),
    )  # fmt: skip


def environment(component: str, home: Path | str) -> dict[str, str]:
    """Return the environment of a component, whose home is a folder of its own."""
    passed = (*_PASSED_ON, *_PROXIES) if component == "supernode" else _PASSED_ON
    kept = {name: os.environ[name] for name in passed if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, **_SETTINGS, "PATH": path, "HOME": str(home), "FLWR_HOME": str(Path(home) / "flwr")}


def write_files(places: Places, kit: Kit) -> None:
    """Write what SuperNode and executor read: the authority's certificate, and a new secret, one copy for each."""
    secret = secrets.token_hex(SECRET_BYTES).encode()
    for name in ("logs", "agent", "node", "executor"):
        (places.state / name).mkdir(parents=True, exist_ok=True)
        (places.state / name).chmod(0o700)
    for name in ("supernode", "executor"):
        # The folder is its component's own: whatever is called secret there a moment later may be a link to any file.
        write_atomic(places.secret(name), secret, mode=0o600)
    write_atomic(places.ca_certificate, kit.ca_certificate.encode())


def free_port() -> int:
    """Return a port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
