"""Separate users for agent, SuperNode and executor, where the supervisor may switch users."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from client.agent.permissions import FOLDER_MODE
from client.places import Places
from client.site_config import SiteConfig
from client.supervise.folders import ledger_files, ledger_folder, socket_files, socket_folder
from common.errors import ConfigError

ONE_USER = (
    "agent, SuperNode and executor run as one user: whatever the coordinator's ClientApp does, it does with that "
    "user's rights, and may read the data. For separate users see fedtune-client systemd, or set users in the site "
    "config and start as root."
)


def are_separate(site_config: SiteConfig) -> bool:
    """Whether components run as users of their own when this process starts them."""
    return site_config.users is not None and os.geteuid() == 0


def hand_over(places: Places, site_config: SiteConfig) -> None:
    """Give each user what it alone needs, before components are started. Data and model the engineer gives.

    Raises:
        ConfigError: for a user that the system does not know, or a ledger or socket in a folder that is not the site's
            own; then nothing was changed.
    """
    users = site_config.users
    if users is None:
        return
    agent, supernode, executor = (_known(name) for name in (users.agent, users.supernode, users.executor))
    ledger, run = ledger_folder(places, site_config, users), socket_folder(places, site_config, users)
    for name, user in (("agent", agent), ("supernode", supernode), ("executor", executor)):
        folder = places.own_folder(name)
        for path in (folder, *folder.iterdir()):
            _own(path, user.pw_uid, user.pw_gid)
    _give(ledger, ledger_files(site_config), agent.pw_uid, agent.pw_gid)
    os.chown(places.site_config, -1, agent.pw_gid)
    places.state.chmod(0o755)
    places.private_key.parent.chmod(0o755)
    _own(places.private_key, supernode.pw_uid, supernode.pw_gid)
    run.mkdir(parents=True, exist_ok=True)
    _give(run, socket_files(places.socket(site_config)), agent.pw_uid, executor.pw_gid, FOLDER_MODE)


def _known(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            f"users of the site config has {name!r}; expected a user of this system. Make it: useradd --system {name}."
        ) from None


def _own(path: Path, user: int, group: int) -> None:
    os.chown(path, user, group, follow_symlinks=False)


def _give(folder: Path, names: Iterable[str], user: int, group: int, mode: int | None = None) -> None:
    """Give a folder, and what of ``names`` is in it; through a descriptor, so that nothing else takes its place."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(descriptor, user, group)
        if mode is not None:
            os.fchmod(descriptor, mode)  # after chown, which takes the bit away that gives the socket its group
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, user, group, dir_fd=descriptor, follow_symlinks=False)
    finally:
        os.close(descriptor)
