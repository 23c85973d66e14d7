"""Files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write ``content`` to ``path``: temporary name in the same folder, fsync, rename, fsync of the folder.

    Args:
        path: of the file. A link there is replaced, not followed.
        content: all of it.
        mode: its permissions from the moment it is made, less those of the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
