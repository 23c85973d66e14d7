"""The optional packages that the audit needs, looked for before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from common.errors import ConfigError

NEEDED = ("matplotlib", "scipy", "sklearn")


def expect_installed(packages: Sequence[str] = NEEDED) -> None:
    """Check that the optional packages are there.

    Raises:
        ConfigError: naming those that are not, and the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the audit needs {', '.join(missing)}, not installed; expected the extra 'audit'. "
            "Run: pip install -e '.[audit]'."
        )
