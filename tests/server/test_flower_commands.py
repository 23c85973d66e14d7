"""What is handed to Flower as the app of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from server.flower_commands import stage_app


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_staged_app_is_what_its_listing_names_and_nothing_of_before(tmp_path: Path) -> None:
    app, staged = tmp_path / "tree", tmp_path / "home" / "app"
    write(app, "code/a.py", "code/deep/b.py", "code/deep/b.pyc", "LICENSE", ".venv/code/c.py", "runs/d.py", "site.key")
    (app / "pyproject.toml").write_text('[tool.flwr.app]\nfab-include = ["code/**/*.py", "/LICENSE"]\n')
    stage_app(app, staged)
    assert files_below(staged) == {"pyproject.toml", "code/a.py", "code/deep/b.py", "LICENSE"}
    assert (staged / "code/deep/b.py").read_text(encoding="utf-8") == "code/deep/b.py"
    (app / "code/a.py").unlink()
    stage_app(app, staged)
    assert files_below(staged) == {"pyproject.toml", "code/deep/b.py", "LICENSE"}


@pytest.mark.parametrize("text", [None, "", "[tool.flwr.app]\n", "[tool.flwr.app]\nfab-include = 3\n", "no toml"])
def test_folder_that_says_no_listing_is_refused_and_the_staged_one_kept(tmp_path: Path, text: str | None) -> None:
    app, staged = tmp_path / "tree", tmp_path / "staged"
    write(app, "a.py")
    write(staged, "before.py")
    if text is not None:
        (app / "pyproject.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="fab-include"):
        stage_app(app, staged)
    assert files_below(staged) == {"before.py"}
