"""Three users, where the test may switch: who may read what, and who reaches the agent's socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
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
from client.supervise.users import hand_over
from tests.federation_keys import unsigned_kit

USERS = Users(agent="daemon", supernode="games", executor="nobody")
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or PYTHON is None, reason="only root may switch users")


@pytest.fixture
def site() -> Iterator[tuple[Places, SiteConfig]]:
    """A site in a folder that everybody may pass through, its files handed over."""
    for user in USERS.model_dump().values():
        try:
            pwd.getpwnam(user)
        except KeyError:
            pytest.skip(f"this system has no user {user}")
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


def as_user(name: str, code: str, *arguments: Path) -> bool:
    """Whether a program that another user runs ends well."""
    user = pwd.getpwnam(name)
    command = [str(PYTHON), "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, user=name, group=user.pw_gid, extra_groups=[], cwd="/", capture_output=True, check=False
    )
    return done.returncode == 0


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
