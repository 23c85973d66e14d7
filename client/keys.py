"""The site's key: made on the site, never sent. What Flower's SuperNode signs its calls with."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.places import Places
from common.atomic import sync_folder, write_atomic
from common.errors import ConfigError


def make_key(places: Places) -> None:
    """Make the site's key, once: private part for its owner alone (0600), public part beside it, both as OpenSSH.

    Raises:
        ConfigError: if there is one already.
    """
    folder = places.private_key.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    try:
        descriptor = os.open(places.private_key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{places.private_key} exists; expected a site without a key. The coordinator knows this one: keep it, or "
            "move it away and be enrolled again."
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
        file.flush()
        os.fsync(file.fileno())
    write_atomic(places.public_key, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    places.public_key.chmod(0o644)
    sync_folder(folder)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the site's private key.

    Raises:
        ConfigError: if it is not there, no key, or open to others.
    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected the site's key. Make it: fedtune-client init."
        ) from None
    if mode & 0o077:
        raise ConfigError(f"{path} is open to others ({mode & 0o777:o}); expected 600. Close it: chmod 600 {path}.")
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no EC key; expected the one that fedtune-client init made. Restore it.")
    return key
