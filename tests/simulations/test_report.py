"""Reports: names from data are text, whatever is in them; nothing is loaded; no row and no path is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import simulations.cli
from common.config.run import RunConfig
from simulations.report.page import Page, Part, Rows, render
from simulations.report.write import write_report
from simulations.run import simulate
from simulations.study.style import drawing
from tests.conftest import label_rows, write_rows

runner = CliRunner()
HOSTILE = "<script>alert('$x^2$')</script> & \"co\""


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def test_every_place_of_a_page_is_escaped() -> None:
    with drawing() as canvas:
        canvas.panels[0].set_xlabel(HOSTILE)
        picture = canvas.picture("p", HOSTILE)
    part = Part(HOSTILE, [HOSTILE], [Rows([HOSTILE], [[HOSTILE]])], [picture], HOSTILE)
    tags = read(render(Page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [part])))
    assert "script" not in tags.tags
    assert tags.text.count(HOSTILE) == 11
    assert b"<script" not in picture.svg


def test_report_of_a_run_holds_its_figures_and_loads_nothing(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(federation={"rounds": 2})
    for name, count in (("train", 36), ("test", 12)):
        rows = [{**row, "site": HOSTILE if row["site"] == "site 1" else row["site"]} for row in label_rows(count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    summary = simulate(config, tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    tags = read(html)
    assert "script" not in tags.tags
    assert HOSTILE in tags.text
    assert len(tags.sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)
    assert not re.search(r"https?://", tags.text)
    accuracy = summary["metrics_after"]["test"]["overall"]["accuracy"]
    assert f"{100 * accuracy:.1f} %" in tags.text
    assert summary["privacy_claim"] in tags.text
    assert str(tmp_path) not in html
    for row in label_rows(36):
        assert row["text"] not in html
    assert write_report(tmp_path / "run").read_text(encoding="utf-8") == html


def test_report_says_what_did_not_count_and_why(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    attacked = {"attacks": [{"name": "nan", "share": 0.34}]}
    simulate(make_config(federation={"rounds": 2}, simulation=attacked), tmp_path / "run")
    text = " ".join(read(write_report(tmp_path / "run").read_text(encoding="utf-8")).text.split())
    assert "What did not count" in text
    for words in ("rejected", "non_finite: the update holds NaN or infinity; expected finite numbers", "2 from 1 to 2"):
        assert words in text


def test_report_of_a_run_that_was_never_evaluated(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    simulate(make_config(data={"test": None}), tmp_path / "run")
    assert "by site" in read(write_report(tmp_path / "run").read_text(encoding="utf-8")).text.lower()


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_folder_without_a_complete_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
        (tmp_path / "compare.json").write_text(json.dumps({}))
    result = runner.invoke(simulations.cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "report.html").exists()
