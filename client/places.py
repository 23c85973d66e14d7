"""Where a site's files are: beside its site config.

::

    site.yaml            the site config
    site.kit.yaml        the coordinator's kit, once enrolled
    keys/site.key        the site's private key, which never leaves; keys/site.pub, which is sent to the coordinator
    state/run/           the agent's socket, for the agent's user and the executor's group
    state/logs/          one log a component
    state/node/          what the SuperNode alone reads: CA certificate, secret, Flower's home
    state/executor/      what the executor alone reads: its copy of the secret, Flower's home with the app bundles
    state/up.json        what fedtune-client up runs; state/up.lock is held while it does
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.site_config import SiteConfig

COMPONENTS = ("agent", "supernode", "executor")


@dataclass(frozen=True)
class Places:
    """Paths of one site.

    Attributes:
        site_config: the site config, absolute.
    """

    site_config: Path

    @classmethod
    def beside(cls, site_config: Path) -> Places:
        """Return the places of a site config, wherever the command was given."""
        return cls(site_config.absolute())

    @property
    def folder(self) -> Path:
        """The folder that everything is in."""
        return self.site_config.parent

    @property
    def kit(self) -> Path:
        """The enrolled kit."""
        return self.site_config.with_name(f"{self.site_config.stem}.kit.yaml")

    @property
    def private_key(self) -> Path:
        """The site's private key."""
        return self.folder / "keys" / "site.key"

    @property
    def public_key(self) -> Path:
        """The site's public key."""
        return self.folder / "keys" / "site.pub"

    @property
    def keys_for_systemd(self) -> Path:
        """The secret between SuperNode and executor, where systemd hands it to both."""
        return self.folder / "keys" / "executor.secret"

    @property
    def state(self) -> Path:
        """What the running site keeps."""
        return self.folder / "state"

    def own_folder(self, component: str) -> Path:
        """The folder that a component alone may read."""
        return self.state / {"agent": "agent", "supernode": "node", "executor": "executor"}[component]

    def log(self, component: str) -> Path:
        """The log of a component."""
        return self.state / "logs" / f"{component}.log"

    def secret(self, component: str) -> Path:
        """A component's copy of the secret between SuperNode and executor."""
        return self.own_folder(component) / "secret"

    @property
    def ca_certificate(self) -> Path:
        """The authority's certificate, as the SuperNode reads it."""
        return self.own_folder("supernode") / "ca.crt"

    def socket(self, site_config: SiteConfig) -> Path:
        """The agent's socket."""
        return Path(site_config.socket) if site_config.socket else self.state / "run" / "agent.sock"

    @property
    def running(self) -> Path:
        """What runs, as the supervisor wrote it."""
        return self.state / "up.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor."""
        return self.state / "up.lock"
