"""Three users, where the test may switch: who may read what, and who reaches the agent's socket."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.agent.server import AgentServer
from client.keys import make_key
from client.places import Places
from client.site_config import SiteConfig, Users
from client.supervise.components import write_files
from client.supervise.folders import ledger_files
from client.supervise.users import hand_over
from common.errors import ConfigError
from tests.federation_keys import unsigned_kit
from tests.other_users import as_user, expect_users, switches_users

USERS = Users(agent="daemon", supernode="games", executor="nobody")

pytestmark = switches_users


@pytest.fixture
def site() -> Iterator[tuple[Places, SiteConfig]]:
    """A site in a folder that everybody may pass through, its files handed over."""
    expect_users(*USERS.model_dump().values())
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "ledger").mkdir(mode=0o700)
        for file in ("own.jsonl", "ledger/ledger.db", "site.yaml"):
            (folder / file).write_text("private")
            (folder / file).chmod(0o640 if file == "site.yaml" else 0o600)
        os.chown(folder / "own.jsonl", pwd.getpwnam(USERS.agent).pw_uid, 0)
        config = SiteConfig.model_validate({
            "name": "north", "data": str(folder / "own.jsonl"), "model": "base",
            "ledger": str(folder / "ledger" / "ledger.db"),
            "rows": {"task": "causal_lm"}, "budget": {"epsilon": 1.0}, "users": USERS.model_dump(),
        })  # fmt: skip
        places = Places.beside(folder / "site.yaml")
        make_key(places)
        write_files(places, unsigned_kit())
        hand_over(places, config)
        yield places, config


def may_read(name: str, path: Path) -> bool:
    return as_user(name, "import sys; open(sys.argv[1], 'rb').read(1)", path)


def test_each_user_reads_its_own_files_and_no_others(site: tuple[Places, SiteConfig]) -> None:
    places, config = site
    own = {
        "agent": [Path(config.data), Path(config.ledger), places.site_config],
        "supernode": [places.private_key, places.secret("supernode"), places.ca_certificate],
        "executor": [places.secret("executor")],
    }
    for component, user in USERS.model_dump().items():
        for owner, paths in own.items():
            for path in paths:
                assert may_read(user, path) == (owner == component), (component, path)


class Echo:
    def answer(self, kind: str, config: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return header, payload

    def status(self) -> dict[str, Any]:
        return {}


def test_socket_is_reached_by_the_executor_alone_which_cannot_take_its_place(site: tuple[Places, SiteConfig]) -> None:
    places, config = site
    socket = places.socket(config)
    server = AgentServer(Echo(), socket)
    server.start()
    try:
        connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        assert as_user(USERS.executor, connect, socket)
        assert not as_user(USERS.supernode, connect, socket)
        assert not as_user(USERS.executor, "import os, sys; os.unlink(sys.argv[1])", socket)
        assert not as_user(USERS.executor, f"import os; os.kill({os.getpid()}, 0)")
    finally:
        server.stop(0)


def test_secret_is_made_for_its_owner_alone_and_a_link_put_in_its_place_is_not_followed(
    site: tuple[Places, SiteConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    places, _ = site
    secret, victim = places.secret("executor"), places.folder / "victim"
    victim.write_text("kept")
    victim.chmod(0o644)
    modes, replace = list[int](), os.replace

    def swapped(source: Path, target: Path) -> None:
        """What the executor's user, whose folder it is, does as soon as the secret is there."""
        replace(source, target)
        if target == secret:
            modes.append(secret.stat().st_mode & 0o777)
            swap = "import os, sys; os.unlink(sys.argv[1]); os.symlink(sys.argv[2], sys.argv[1])"
            assert as_user(USERS.executor, swap, secret, victim)

    monkeypatch.setattr(os, "replace", swapped)
    write_files(places, unsigned_kit())
    assert (secret.is_symlink(), modes) == (True, [0o600])
    assert (victim.stat().st_mode & 0o777, victim.read_text()) == (0o644, "kept")
    write_files(places, unsigned_kit())  # with the link there from the start
    assert (victim.stat().st_mode & 0o777, victim.read_text()) == (0o644, "kept")


def owners(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {path: (s.st_uid, s.st_gid, s.st_mode) for path in (folder, *folder.rglob("*")) for s in [path.lstat()]}


@pytest.mark.parametrize(
    "changes",
    [
        {"ledger": "ledger.db"},
        {"ledger": "shared/ledger.db"},
        {"socket": "agent.sock"},
        {"socket": "shared/agent.sock"},
        {"socket": "sticky/agent.sock"},
    ],
)
def test_folder_that_is_not_the_sites_own_is_refused_before_anything_is_changed(
    site: tuple[Places, SiteConfig], changes: dict[str, str]
) -> None:
    places, config = site
    for name in ("shared", "sticky"):
        (places.folder / name).mkdir()
    (places.folder / "sticky").chmod(0o1777)
    (places.folder / "shared" / "of somebody else").write_text("kept")
    shutil.rmtree(places.state / "run")
    os.chown(places.private_key, 0, 0)
    os.chown(places.own_folder("agent"), 0, 0)
    before = owners(places.folder)
    other = config.model_copy(update={key: str(places.folder / path) for key, path in changes.items()})
    with pytest.raises(ConfigError, match="expected a folder for it alone"):
        hand_over(places, other)
    assert owners(places.folder) == before


def test_ledgers_files_are_handed_over_by_name(site: tuple[Places, SiteConfig]) -> None:
    places, config = site
    folder, agent = places.folder / "ledger", pwd.getpwnam(USERS.agent).pw_uid
    for name in (*ledger_files(config), "of somebody else"):
        (folder / name).write_text("private")
        os.chown(folder / name, 0, 0)
    (places.state / "run" / "agent.lock").write_text("")
    hand_over(places, config)
    theirs = {path.name for path in folder.iterdir() if path.stat().st_uid == agent}
    assert theirs == set(ledger_files(config))
    assert (places.state / "run" / "agent.lock").stat().st_uid == agent
    assert places.socket(config).parent.stat().st_mode & 0o7777 == 0o2750


def test_agents_user_can_write_the_ledger_and_beside_it(site: tuple[Places, SiteConfig]) -> None:
    _, config = site
    write = "import sys; [open(sys.argv[1] + end, 'ab').write(b'x') for end in ('', '-journal', '-personal')]"
    assert as_user(USERS.agent, write, Path(config.ledger))
    assert not as_user(USERS.executor, write, Path(config.ledger))
