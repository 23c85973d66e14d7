"""Pages name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_tests_that_the_threat_model_names_exist() -> None:
    text = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    folder, named = Path(), []
    for name in re.findall(r"`([\w/]*test_\w+\.py)`", text):
        path = Path(name)
        folder = path.parent if path.parent != Path() else folder  # a bare name is beside the one before it
        named.append(folder / path.name)
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / "tests" / path).exists()]
