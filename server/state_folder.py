"""The coordinator's state folder and the files in it. Only its owner may open it.

::

    server.yaml       the server config
    ca.key ca.crt     the federation's own certificate authority
    tls/              keys and certificates of gateway, SuperLink and control service
    coordinator.key   signs the kits
    executor.secret   what the executor shows to the SuperLink
    sites.json        enrolled sites and their public keys
    superlink.db      Flower's state
    flower/           FLWR_HOME: Flower's configuration and installed bundles
    runs/NAME/        one folder a run: submission.json, lease.json, steering.json, run/ (the run folder)
    sockets/          control sockets
    log/              a log of each component
    up.json           what runs now
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError, RunError
from server.server_config import ServerConfig, load_server_config

SOCKET_PATH_BYTES = 107
"""What fits into the address of a unix socket."""
_SOCKET_NAME = 17


class StateFolder:
    """Paths of a coordinator.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.config_file = path / "server.yaml"
        self.ca_key, self.ca_certificate = path / "ca.key", path / "ca.crt"
        self.tls = path / "tls"
        self.coordinator_key = path / "coordinator.key"
        self.executor_secret = path / "executor.secret"
        self.sites = path / "sites.json"
        self.database = path / "superlink.db"
        self.flower_home = path / "flower"
        self.runs = path / "runs"
        self.sockets = path / "sockets"
        self.logs = path / "log"
        self.up = path / "up.json"

    @classmethod
    def open(cls, path: Path) -> StateFolder:
        """Return the state folder at ``path``.

        Raises:
            ConfigError: if none is there, or others may open it.
        """
        state = cls(path)
        if not state.config_file.is_file():
            raise ConfigError(
                f"{path} is no state folder of a coordinator; expected server.yaml in it. Make one with "
                "fedtune-server init, or name yours with --state."
            )
        if state.path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be opened by other users; expected mode 0700. Run: chmod 700 {path}")
        return state

    @classmethod
    def create(cls, path: Path) -> StateFolder:
        """Make a state folder that only its owner may open.

        Raises:
            ConfigError: if something is there already, or the path is too long for control sockets.
        """
        state = cls(path)
        length = len(os.fsencode(state.sockets)) + 1 + _SOCKET_NAME
        if length > SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{path} is a path of {len(os.fsencode(state.path))} bytes; expected at most "
                f"{len(os.fsencode(state.path)) - length + SOCKET_PATH_BYTES}, for unix sockets in it. Choose a "
                "shorter one."
            )
        if state.path.exists() and (not state.path.is_dir() or any(state.path.iterdir())):
            raise ConfigError(f"{path} exists and is not empty; expected a new folder. Choose another.")
        state.path.mkdir(parents=True, exist_ok=True)
        state.path.chmod(0o700)
        for folder in (state.tls, state.flower_home, state.runs, state.sockets, state.logs):
            folder.mkdir()
        return state

    def config(self) -> ServerConfig:
        """Read the server config."""
        return load_server_config(self.config_file)

    def certificate(self, of: str) -> Path:
        """Return the certificate of "gateway", "superlink", "control" or "operator"."""
        return self.tls / f"{of}.crt"

    def key(self, of: str) -> Path:
        """Return the private key that goes with :meth:`certificate`."""
        return self.tls / f"{of}.key"

    def socket(self, run: str) -> Path:
        """Return the control socket of a run: short, whatever its name is."""
        return self.sockets / (hashlib.sha256(run.encode()).hexdigest()[:12] + ".sock")

    def log(self, component: str) -> Path:
        """Return the log of a component."""
        return self.logs / f"{component}.log"


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read.

    Raises:
        FileExistsError: if something stands there.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path, *, wait: bool = True, what: str = "it") -> Iterator[None]:
    """Hold an exclusive lock on a file; the system lets go of it when the process ends, however it ends.

    Args:
        path: the lock file; made if need be, never removed.
        wait: wait for whoever holds it.
        what: what is locked, for the error.

    Raises:
        RunError: if it is held and ``wait`` is false.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(f"{what} is in use by another process; expected nobody. End that one first.") from None
        yield
    finally:
        os.close(descriptor)
