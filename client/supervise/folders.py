"""The two folders that go to the agent's user, the ledger's and the socket's: which ones are the site's to give.

Given is a folder that is there for the ledger or the socket alone: it is not there yet, holds nothing else, or is the
agent's user's already. Never given are the site's own folder and those above it, where whoever owns them could put
another key in the place of the site's, and outside of it none that several users share (sticky) or all may enter.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

from client.agent.permissions import FOLDER_MODE
from client.places import Places
from client.site_config import SiteConfig, Users
from common.errors import ConfigError

_SQLITE = ("", "-journal", "-wal", "-shm")
_EVERYBODY = 0o007


def ledger_files(site_config: SiteConfig) -> tuple[str, ...]:
    """Return the names in the ledger's folder that are the agent's: ledger and personal file, and SQLite's of each."""
    name = Path(site_config.ledger).name
    return tuple(name + own + end for own in ("", "-personal") for end in _SQLITE)


def socket_files(socket: Path) -> tuple[str, ...]:
    """Return the names in the socket's folder: the socket and the agent's lock."""
    return socket.name, socket.with_suffix(".lock").name


def ledger_folder(places: Places, site_config: SiteConfig, users: Users) -> Path:
    """Return the ledger's folder, links followed.

    Args:
        places: where the site's files are.
        site_config: the site's.
        users: whom the components run as; the system need not know them yet.

    Raises:
        ConfigError: for one that is missing, or not the site's to give to the agent's user.
    """
    ledger = Path(site_config.ledger)
    folder, what = ledger.parent.resolve(), f"ledger {ledger}"
    remedy = (
        "Move it (with its -personal file) to a new folder, made with mkdir -m 700, and name that place in the site "
        "config."
    )
    if ledger.is_symlink():
        raise ConfigError(f"{what} is a link; expected the file. {remedy}")
    if not os.path.isdir(folder):
        raise ConfigError(
            f"{what} is in no folder that is there for this user; expected one for it alone. Restore both, or for new "
            f"data give mkdir -m 700 {folder} and fedtune-client new-ledger."
        )
    agent = _uid(users.agent)

    def is_known(name: str) -> bool:
        return name == ledger.name or name.startswith((f"{ledger.name}-", f"{ledger.name}.", f".{ledger.name}."))

    _expect_own(places, what, folder, lambda found: found.st_uid == agent, is_known, remedy)
    if folder == places.socket(site_config).parent.resolve():
        raise ConfigError(f"{what} is in the folder of the agent's socket; expected one for it alone. {remedy}")
    return folder


def socket_folder(places: Places, site_config: SiteConfig, users: Users) -> Path:
    """Return the folder of the agent's socket, which need not be there yet.

    Args:
        places: where the site's files are.
        site_config: the site's.
        users: whom the components run as.

    Raises:
        ConfigError: for one that is not the site's to give to the agent's user and the executor's group.
    """
    socket = places.socket(site_config)
    folder, what = socket.parent.resolve(), f"socket {socket}"
    remedy = "Name a folder that is not there yet in the site config, or leave socket out."
    if socket.parent.is_symlink():
        raise ConfigError(f"{what} is in a folder that is a link; expected the folder. {remedy}")
    agent, group = _uid(users.agent), _gid(users.executor)

    def is_given(found: os.stat_result) -> bool:
        return (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (agent, group, FOLDER_MODE)

    _expect_own(places, what, folder, is_given, socket_files(socket).__contains__, remedy)
    return folder


def _expect_own(
    places: Places,
    what: str,
    folder: Path,
    is_given: Callable[[os.stat_result], bool],
    is_known: Callable[[str], bool],
    remedy: str,
) -> None:
    site = places.folder.resolve()
    others = (
        places.private_key, places.running, places.log("agent"), places.secret("supernode"), places.secret("executor"),
    )  # fmt: skip
    if folder in (site, *site.parents, *(path.parent.resolve() for path in others)):
        raise ConfigError(
            f"{what} is in {folder}, which the agent's user must not own; expected a folder for it alone. {remedy}"
        )
    try:
        reason = _not_own(folder, folder.is_relative_to(site), is_given, is_known) if folder.exists() else None
    except OSError as error:
        reason = f"which this user may not look at ({error.strerror})"
    if reason is not None:
        raise ConfigError(f"{what} is in {folder}, {reason}; expected a folder for it alone. {remedy}")


def _not_own(
    folder: Path, inside: bool, is_given: Callable[[os.stat_result], bool], is_known: Callable[[str], bool]
) -> str | None:
    """Return why a folder is not the site's to give; None where it is."""
    found = folder.stat()
    if is_given(found):
        return None
    if found.st_mode & stat.S_ISVTX:
        return "which users share (sticky bit)"
    if found.st_mode & _EVERYBODY and not inside:
        return "which is open to everybody"
    others = sorted(name for name in os.listdir(folder) if not is_known(name))
    return f"which also holds {others[0]!r}" if others else None


def _uid(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _gid(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_gid
    except KeyError:
        return None
