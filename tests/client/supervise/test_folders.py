"""Which folders of ledger and socket are the site's to give to the agent's user, and how units write their paths."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from client.places import Places
from client.site_config import SiteConfig, Users
from client.supervise.folders import ledger_files, ledger_folder, socket_folder
from client.supervise.systemd import DEFAULT_USERS, units_of
from common.errors import ConfigError
from tests.federation_keys import unsigned_kit


def places_in(folder: Path) -> Places:
    """A site's folder with key, config and an empty ledger folder; the ledger's and the socket's are not made."""
    places = Places.beside(folder / "north" / "site.yaml")
    for path in (places.private_key, places.site_config, places.log("agent")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("private")
    (places.folder / "ledger").mkdir()
    return places


def config_of(places: Places, ledger: str | Path = "ledger/ledger.db", agent_socket: str | None = None) -> SiteConfig:
    return SiteConfig.model_validate({
        "name": "north", "data": str(places.folder / "own.jsonl"), "model": "base",
        "ledger": str(places.folder / ledger), "socket": agent_socket and str(places.folder / agent_socket),
        "rows": {"task": "causal_lm"}, "budget": {"epsilon": 1.0},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("ledger", "what"),
    [
        ("ledger.db", "must not own"),
        ("../ledger.db", "must not own"),
        ("/ledger.db", "must not own"),
        ("keys/ledger.db", "must not own"),
        ("state/logs/ledger.db", "must not own"),
        ("/usr/ledger.db", "open to everybody"),
        ("/var/tmp/ledger.db", "sticky"),  # noqa: S108
        ("absent/ledger.db", "in no folder"),
        ("ledger/link.db", "is a link"),
        ("foreign/ledger.db", "also holds 'own.jsonl'"),
        ("outside/ledger.db", "open to everybody"),
    ],
)
def test_ledger_in_a_folder_that_is_not_the_sites_own_is_refused_by_units_too(
    tmp_path: Path, ledger: str, what: str
) -> None:
    places = places_in(tmp_path)
    (places.folder / "ledger" / "link.db").symlink_to(tmp_path / "elsewhere.db")
    (places.folder / "foreign").mkdir(mode=0o700)
    (places.folder / "foreign" / "own.jsonl").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o755)
    (places.folder / "outside").symlink_to(tmp_path / "out")
    own = config_of(places, ledger)
    with pytest.raises(ConfigError, match=what) as refused:
        ledger_folder(places, own, DEFAULT_USERS)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=what):
        units_of(places, own, unsigned_kit(), "north")


@pytest.mark.parametrize(
    ("agent_socket", "what"),
    [
        ("agent.sock", "must not own"),
        ("state/agent.sock", "must not own"),
        ("/var/tmp/agent.sock", "sticky"),  # noqa: S108
        ("/usr/agent.sock", "open to everybody"),
        ("ledger/agent.sock", "also holds 'ledger.db'"),
        ("link/agent.sock", "is a link"),
    ],
)
def test_socket_in_a_folder_that_is_not_the_sites_own_is_refused(tmp_path: Path, agent_socket: str, what: str) -> None:
    places = places_in(tmp_path)
    (places.folder / "ledger" / "ledger.db").write_text("")
    (places.folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=what) as refused:
        socket_folder(places, config_of(places, agent_socket=agent_socket), DEFAULT_USERS)
    assert "\n" not in str(refused.value)


def test_folders_that_are_new_or_hold_the_sites_files_alone_are_its_own(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    own = config_of(places)
    for name in (*ledger_files(own), "ledger.db.copy", ".ledger.db.0123"):
        (places.folder / "ledger" / name).write_text("")
    assert ledger_folder(places, own, DEFAULT_USERS) == places.folder / "ledger"
    run = places.socket(own).parent
    assert socket_folder(places, own, DEFAULT_USERS) == run
    run.mkdir()
    (run / "agent.lock").write_text("")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(run / "agent.sock"))
    assert socket_folder(places, own, DEFAULT_USERS) == run
    (tmp_path / "closed").mkdir(mode=0o700)
    assert ledger_folder(places, config_of(places, tmp_path / "closed" / "l.db"), DEFAULT_USERS) == tmp_path / "closed"


def test_ledgers_folder_that_is_the_agents_already_may_hold_more_and_is_not_the_sockets(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    me = pwd.getpwuid(os.geteuid()).pw_name
    users = Users(agent=me, supernode="fedtune-node", executor="fedtune-executor")
    (places.folder / "ledger" / "own.jsonl").write_text("{}")
    assert ledger_folder(places, config_of(places), users) == places.folder / "ledger"
    with pytest.raises(ConfigError, match="also holds"):
        socket_folder(places, config_of(places, agent_socket="ledger/agent.sock"), users)
    with pytest.raises(ConfigError, match="folder of the agent's socket"):
        ledger_folder(places, config_of(places, agent_socket="ledger/agent.sock"), users)


def test_units_write_paths_as_systemd_reads_them(tmp_path: Path) -> None:
    places = places_in(tmp_path / 'a b%c "d\\e')
    units = units_of(places, config_of(places), unsigned_kit(), "north").files
    site = f'{tmp_path}/a b%%c \\"d\\\\e/north'
    agent, executor = units["fedtune-north-agent.service"], units["fedtune-north-executor.service"]
    assert f'\nReadWritePaths="{site}/ledger"\n' in agent
    assert f'\nInaccessiblePaths="-{site}/keys"\n' in agent
    for part in (executor, units["fedtune-north-supernode.service"]):
        assert f'\nInaccessiblePaths="-{site}/own.jsonl"\n' in part
        assert f'\nInaccessiblePaths="-{site}/ledger/ledger.db"\n' in part
        assert f'\nLoadCredential=secret:{tmp_path}/a b%%c "d\\e/north/keys/executor.secret\n' in part
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in units]
    checked = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    assert not [line for line in checked.stderr.splitlines() if "fedtune-north" in line], checked.stderr
