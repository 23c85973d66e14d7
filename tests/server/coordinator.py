"""A coordinator's state folder and keys of sites, for tests."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from server.authority import create_coordinator
from server.server_config import LimitsConfig, ServerConfig
from server.state_folder import StateFolder

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def server_config(**changes: Any) -> ServerConfig:
    """A coordinator on free ports of the loopback address."""
    port = free_port()
    known: dict[str, Any] = {
        "federation": "clinics", "address": f"{LOOPBACK}:{port}", "host_names": (LOOPBACK,), "listen": LOOPBACK,
        "port": port, "superlink_port": free_port(), "device": "cpu",
    }  # fmt: skip
    return ServerConfig(**{**known, **changes})


@contextmanager
def coordinator(**changes: Any) -> Iterator[StateFolder]:
    """A state folder with a short path, as unix sockets need one."""
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        yield create_coordinator(Path(name) / "c", server_config(**changes))


def limits(**changes: Any) -> LimitsConfig:
    """The gateway's limits with some changed."""
    return LimitsConfig(**changes)


def site_key() -> tuple[bytes, str]:
    """A site's private key as OpenSSH has it, and its public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
