"""Separate users for agent, SuperNode and executor, where the supervisor may switch users."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from client.agent.permissions import FOLDER_MODE
from client.places import Places
from client.site_config import SiteConfig
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
        ConfigError: for a user that the system does not know.
    """
    users = site_config.users
    if users is None:
        return
    agent, supernode, executor = (_known(name) for name in (users.agent, users.supernode, users.executor))
    for name, user in (("agent", agent), ("supernode", supernode), ("executor", executor)):
        folder = places.own_folder(name)
        for path in (folder, *folder.iterdir()):
            _own(path, user.pw_uid, user.pw_gid)
    ledger = Path(site_config.ledger).parent
    if ledger != places.folder:  # whoever owns the site's folder could put another key in the place of ours
        for path in (ledger, *ledger.iterdir()):
            _own(path, agent.pw_uid, agent.pw_gid)
    os.chown(places.site_config, -1, agent.pw_gid)
    places.state.chmod(0o755)
    places.private_key.parent.chmod(0o755)
    _own(places.private_key, supernode.pw_uid, supernode.pw_gid)
    run = places.socket(site_config).parent
    run.mkdir(parents=True, exist_ok=True)
    _own(run, agent.pw_uid, executor.pw_gid)
    run.chmod(FOLDER_MODE)  # after chown, which takes the bit away that gives the socket the executor's group


def _known(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            f"users of the site config has {name!r}; expected a user of this system. Make it: useradd --system {name}."
        ) from None


def _own(path: Path, user: int, group: int) -> None:
    os.chown(path, user, group, follow_symlinks=False)
