"""Programs that another user of this machine runs, where the test may switch users."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
"""An interpreter that every user may run: the one of the tests may lie in a folder that is closed to others."""

switches_users = pytest.mark.skipif(os.geteuid() != 0 or PYTHON is None, reason="only root may switch users")


def expect_users(*names: str) -> None:
    """Skip the test on a system that lacks one of the users."""
    for name in names:
        try:
            pwd.getpwnam(name)
        except KeyError:
            pytest.skip(f"this system has no user {name}")


def as_user(name: str, code: str, *arguments: Path) -> bool:
    """Whether a program that another user runs ends well."""
    user = pwd.getpwnam(name)
    command = [str(PYTHON), "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, user=name, group=user.pw_gid, extra_groups=[], cwd="/", capture_output=True, check=False
    )
    return done.returncode == 0
