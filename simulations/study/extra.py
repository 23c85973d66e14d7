"""The optional packages that a command needs, looked for before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from common.errors import ConfigError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "audit": ("matplotlib", "scipy", "sklearn"),
    "plots": ("jinja2", "matplotlib", "scipy"),
    "sweep": ("jinja2", "matplotlib", "optuna", "scipy"),
}
"""Packages of each extra that is needed by a command."""


def expect_extra(extra: str, what: str) -> None:
    """Check that the packages of an extra are there.

    Args:
        extra: its name.
        what: what needs it, for the error ("the audit").

    Raises:
        ConfigError: naming those that are not, and the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}, not installed; expected the extra {extra!r}. "
            f"Run: pip install -e '.[{extra}]'."
        )
