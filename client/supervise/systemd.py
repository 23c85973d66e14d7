"""systemd units for a site: three services, each under a user of its own.

systemd hands key and secret to the services as credentials (a copy that the service alone can read), so that the files
themselves stay root's. The agent's user must be able to read data and model and to write the ledger's folder.
"""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path

from client.places import Places
from client.site_config import SiteConfig, Users
from client.supervise.components import (
    RUNTIME_PORT,
    SECRET_BYTES,
    agent_command,
    environment,
    executor_command,
    supernode_command,
)
from client.supervise.folders import ledger_folder
from common.atomic import write_atomic
from common.kit import Kit

DEFAULT_USERS = Users(agent="fedtune-agent", supernode="fedtune-node", executor="fedtune-executor")
_CREDENTIALS = "%d"
"""systemd's name for the folder of a service's credentials."""

_UNIT = """\
[Unit]
Description=fedtune site {site}: {name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
User={user}
Group={group}
{own}ExecStart={command}
{settings}
Restart=always
RestartSec={restart_s}
UMask=0007
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
{more}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Units:
    """What is written.

    Attributes:
        files: text by file name.
        commands: shell commands that set users and files up and start the services, in order.
    """

    files: dict[str, str]
    commands: tuple[str, ...]


def units_of(places: Places, site_config: SiteConfig, kit: Kit, name: str) -> Units:
    """Return the units of a site.

    Args:
        places: where its files are.
        site_config: the site's.
        kit: the enrolled one.
        name: short name of the site in unit and folder names.

    Raises:
        ConfigError: for a ledger in a folder that is not the site's to give to the agent's user.
    """
    users = site_config.users or DEFAULT_USERS
    port = site_config.runtime_port or RUNTIME_PORT
    run = f"fedtune-{name}"
    socket = Path(site_config.socket) if site_config.socket else Path("/run") / run / "agent.sock"
    secret = places.keys_for_systemd
    ledger = ledger_folder(places, site_config, users)
    keys = f"InaccessiblePaths={_word(f'-{places.private_key.parent}')}\n"
    agent = f"RuntimeDirectory={run}\nRuntimeDirectoryMode=2750\nReadWritePaths={_word(str(ledger))}\n{keys}"
    supernode = (
        f"LoadCredential=site.key:{_percent(places.private_key)}\nLoadCredential=secret:{_percent(secret)}\n"
        f"StateDirectory={run}-node\n{_hidden(site_config)}"
    )
    executor = f"LoadCredential=secret:{_percent(secret)}\nStateDirectory={run}-executor\n{_hidden(site_config)}{keys}"
    ca_certificate = Path("/etc/fedtune") / f"{name}-ca.crt"
    node = supernode_command(
        kit, f"{_CREDENTIALS}/site.key", ca_certificate, f"{_CREDENTIALS}/secret", socket, port
    )  # fmt: skip
    parts = {
        "agent": (users.agent, users.executor, (*agent_command(places), "--socket", str(socket)), agent, "/run/" + run),
        "supernode": (users.supernode, users.supernode, node, supernode, f"/var/lib/{run}-node"),
        "executor": (
            users.executor, users.executor, executor_command(f"{_CREDENTIALS}/secret", port), executor,
            f"/var/lib/{run}-executor",
        ),
    }  # fmt: skip
    files = {
        f"{run}-{part}.service": _UNIT.format(
            site=_percent(site_config.name), name=part, user=user, group=group, own=own,
            command=_quoted(command), settings=_settings(part, home), restart_s=5, more="",
        )
        for part, (user, group, command, own, home) in parts.items()
    }  # fmt: skip
    services = " ".join(files)
    commands = (
        *(f"useradd --system --user-group --shell /usr/sbin/nologin {user}" for user in users.model_dump().values()),
        "install -d -m 755 /etc/fedtune",
        f"install -m 644 {shlex.quote(str(places.ca_certificate))} {ca_certificate}",
        f"chown root: {shlex.quote(str(places.private_key))} {shlex.quote(str(secret))}",
        f"chown {users.agent}: {_shell(places.site_config)} {_shell(site_config.data)} {_shell(ledger)} "
        f"{_shell(site_config.ledger)}*",
        f"chmod 600 {_shell(places.site_config)} {_shell(site_config.data)} {_shell(site_config.ledger)}",
        "install -m 644 *.service /etc/systemd/system/",
        f"systemctl daemon-reload && systemctl enable --now {services}",
        f"systemctl status {services}",
    )
    return Units(files, commands)


def _hidden(site_config: SiteConfig) -> str:
    """What the other two services must not see, whatever its permissions."""
    return "".join(f"InaccessiblePaths={_word(f'-{path}')}\n" for path in (site_config.data, site_config.ledger))


def _settings(component: str, home: str) -> str:
    values = environment(component, home)
    return "\n".join(f"Environment={_word(f'{name}={value}')}" for name, value in sorted(values.items()))


def _quoted(command: tuple[str, ...]) -> str:
    return " ".join(part if part.startswith(_CREDENTIALS) else _word(part).replace("$", "$$") for part in command)


def _word(text: str) -> str:
    """A word as systemd reads it: in quotes, with its own signs doubled."""
    escaped = _percent(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _percent(text: object) -> str:
    """A text as systemd reads it where it takes no quotes, the path of LoadCredential for one."""
    return str(text).replace("%", "%%")


def _shell(path: object) -> str:
    return shlex.quote(str(path))


def make_secret(places: Places, kit: Kit) -> None:
    """Write what the units load: the secret, kept if there is one, and the authority's certificate."""
    places.keys_for_systemd.parent.mkdir(mode=0o700, exist_ok=True)
    if not places.keys_for_systemd.exists():
        write_atomic(places.keys_for_systemd, secrets.token_hex(SECRET_BYTES).encode(), mode=0o600)
    places.ca_certificate.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(places.ca_certificate, kit.ca_certificate.encode())
