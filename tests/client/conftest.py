"""Fixtures of the tests of a site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from tests.client.real_sites import PRIVATE, RealSite


@pytest.fixture
def make_site(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RealSite]:
    """Make a real site for a run; keyword arguments replace whole sections' keys of the run config."""

    def make(privacy: dict[str, Any] = PRIVATE, budget: dict[str, Any] | None = None, **sections: Any) -> RealSite:
        return RealSite(make_config(privacy=privacy, **sections), tmp_path, **(budget or {}))

    return make
