"""The components as systemd units, for who wants the system to keep them alive in place of ``fedtune-server up``."""

from __future__ import annotations

import shlex
from pathlib import Path

from common.errors import ConfigError
from server.state_folder import StateFolder
from server.supervise.components import Component, coordinator_components

TARGET = "fedtune-coordinator.target"
OWN_VARIABLES = ("FEDTUNE_", "FLWR_", "PATH", "PYTHONPATH")
"""Beginnings of the names of variables that go into a unit; the rest is the system's."""


def unit_files(state: StateFolder, user: str) -> dict[str, str]:
    """Return the text of each unit by file name.

    Args:
        state: the state folder.
        user: who owns it.
    """
    components = coordinator_components(state, state.config())
    units = {_unit_name(component): _unit(state, component, user) for component in components.values()}
    wants = " ".join(units)
    target = f"[Unit]\nDescription=fedtune coordinator\nWants={wants}\n\n[Install]\nWantedBy=multi-user.target\n"
    return {TARGET: target, **units}


def write_units(state: StateFolder, user: str, folder: Path) -> list[Path]:
    """Write the units into a folder and return their paths.

    Raises:
        ConfigError: if the folder is not there.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; expected one, such as /etc/systemd/system. Make it first.")
    written = []
    for name, text in unit_files(state, user).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _unit_name(component: Component) -> str:
    return f"fedtune-{component.name}.service"


def _unit(state: StateFolder, component: Component, user: str) -> str:
    after = "network-online.target" if component.name == "superlink" else "fedtune-superlink.service"
    variables = [
        f"Environment={_quoted(f'{name}={value}')}"
        for name, value in sorted(component.environment.items())
        if name.startswith(OWN_VARIABLES)
    ]
    lines = [
        "[Unit]",
        f"Description=fedtune coordinator: {component.name}",
        f"After={after}",
        f"PartOf={TARGET}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"User={user}",
        f"WorkingDirectory={_percent(str(component.folder))}",
        *variables,
        f"ExecStart={_percent(shlex.join(component.command))}",
        "Restart=always",
        "RestartSec=2",
        "KillMode=control-group",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        f"ReadWritePaths={_percent(str(state.path))}",
        "PrivateTmp=yes",
        "UMask=0077",
        "",
        "[Install]",
        f"WantedBy={TARGET}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + _percent(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _percent(text: str) -> str:
    """Escape what systemd would replace."""
    return text.replace("%", "%%")
