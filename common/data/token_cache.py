"""The token tables of a simulation on disk, each under the fingerprint of everything that shapes it.

::

    FOLDER/tokens/FINGERPRINT/manifest.json   arrays with their SHA-256, site names
                              *.npy           flat arrays, read through a memory map

A table that is damaged is built anew. Two processes that build the same one each write a folder of their own and rename
it; the second finds the first's and drops its own. The folder holds private texts in another form, so that only its
owner may enter it, and a real site has none: see :func:`client.site.real_site`. It can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.dealing import Columns
from common.data.token_table import TokenTable

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_ARRAYS = {
    "input_ids": np.int32, "offsets": np.int64, "targets": np.int32,
    "labels": np.int64, "sites": np.int32, "persons": np.int32, "digests": np.uint8,
}  # fmt: skip


class TokenWriter:
    """Collects the arrays of a table, in files where there is a folder, else in memory.

    Args:
        folder: where ``NAME.npy`` files are written; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._counts: dict[str, int] = {}

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add values to the end of an array."""
        part = np.ascontiguousarray(values, dtype=_ARRAYS[name])
        if self._folder is None:
            self._parts.setdefault(name, []).append(part)
            return
        path = self._folder / f"{name}.npy"
        if name not in self._counts:
            self._counts[name] = 0
            path.write_bytes(_npy_header(name, 0))
        with path.open("ab") as file:
            file.write(part.tobytes())
        self._counts[name] += len(part)

    def finish(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        if self._folder is None:
            return {name: np.concatenate(parts) for name, parts in self._parts.items()}
        for name, count in self._counts.items():
            with (self._folder / f"{name}.npy").open("r+b") as file:
                file.write(_npy_header(name, count))
        return {name: _mapped(self._folder / f"{name}.npy") for name in self._counts}


def _npy_header(name: str, count: int) -> bytes:
    """Header of a .npy file (format 1.0), padded to 128 bytes whatever the count, so that it can be written again."""
    shape = (count, 16) if name == "digests" else (count,)
    described = repr({"descr": np.dtype(_ARRAYS[name]).str, "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + described.ljust(117).encode("ascii") + b"\n"


def _mapped(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def table_of(arrays: dict[str, NDArray[Any]], site_names: tuple[str, ...], *, tokenwise: bool) -> TokenTable:
    """Return the table of arrays by name."""
    columns = Columns(arrays["labels"], arrays["sites"], site_names, arrays["persons"], arrays["digests"])
    return TokenTable(arrays["input_ids"], arrays["offsets"], arrays["targets"], tokenwise, columns)


class TokenCache:
    """A folder of token tables.

    Args:
        folder: made, for its owner alone, when a table is first written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tokens"

    def find(self, fingerprint: str) -> TokenTable | None:
        """Return a table, or None where there is none. A damaged one is removed.

        Raises:
            OSError: if the folder cannot be used.
        """
        place = self._folder / fingerprint
        try:
            manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT or manifest["arrays"].keys() != _ARRAYS.keys():
                raise ValueError("another format")
            for name, digest in manifest["arrays"].items():
                if _digest(place / f"{name}.npy") != digest:
                    raise ValueError(f"{name} is not what was written")
            arrays = {name: _mapped(place / f"{name}.npy") for name in _ARRAYS}
            return table_of(arrays, tuple(map(str, manifest["site_names"])), tokenwise=bool(manifest["tokenwise"]))
        except FileNotFoundError:
            if not place.exists():
                return None
            what = "a file is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = str(error)[:80]
        logger.warning("cached tokens in %s are damaged (%s); they are made again", place, what)
        _remove(place)
        return None

    @contextmanager
    def writing(self, fingerprint: str) -> Iterator[Path]:
        """Give a folder to write a table's arrays in; afterwards it stands under ``fingerprint``.

        Raises:
            OSError: if the folder cannot be used.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        temporary = self._folder / f".{fingerprint}.{os.getpid()}.{secrets.token_hex(4)}"
        temporary.mkdir(mode=0o700)
        try:
            yield temporary
            try:
                temporary.rename(self._folder / fingerprint)
            except OSError:
                if not (self._folder / fingerprint / MANIFEST).exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, site_names: tuple[str, ...], *, tokenwise: bool) -> None:
    """Write the manifest of the arrays in ``folder``."""
    manifest = {
        "format": FORMAT,
        "arrays": {name: _digest(folder / f"{name}.npy") for name in _ARRAYS},
        "site_names": site_names,
        "tokenwise": tokenwise,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _remove(place: Path) -> None:
    """Take a damaged table away in one step; whoever has it mapped keeps what it mapped."""
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
