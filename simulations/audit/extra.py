"""The optional packages that pictures and the audit need, looked for before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from common.errors import ConfigError

NEEDED = ("matplotlib", "scipy", "sklearn")


def expect_installed(packages: Sequence[str] = NEEDED, what: str = "the audit", extra: str = "audit") -> None:
    """Check that the optional packages of an extra are there.

    Raises:
        ConfigError: naming those that are not, and the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}, not installed; expected the extra {extra!r}. "
            f"Run: pip install -e '.[{extra}]'."
        )
