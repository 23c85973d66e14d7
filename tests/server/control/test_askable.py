"""What ``set sites_per_round`` refuses: where it would change nothing, and where later rounds could not be complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from server.control.board import Board
from server.control.steered import Settings, Steered
from tests.server.run_configs import run_config


def steered(folder: Path, **sections: Any) -> Steered:
    return Steered(folder / "steering.json", run_config(**sections), Board("tiny"))


def expect_refused(made: Steered, value: str, match: str) -> None:
    """Setting the value raises one clear line, and nothing is stored that a resubmitted run would take up."""
    with pytest.raises(ConfigError, match=match) as refused:
        made.set("sites_per_round", value)
    assert "\n" not in str(refused.value)
    assert "expected" in str(refused.value)
    assert made.settings == Settings()


@pytest.mark.parametrize(
    "privacy",
    [
        {"unit": "site", "epsilon": 8.0},
        {"unit": "example", "epsilon": 8.0, "site_level": {"epsilon": 4.0}},
    ],
)
@pytest.mark.parametrize("value", ["3", "all"])
def test_site_level_privacy_beside_any_unit_fixes_the_cohort(
    tmp_path: Path, privacy: dict[str, Any], value: str
) -> None:
    made = steered(tmp_path, privacy=privacy, federation={"sites_per_round": 4})
    expect_refused(made, value, "mechanism of site-level privacy")
    made.set("round_timeout_s", "60")  # which is no part of it


@pytest.mark.parametrize(
    ("robust", "bad", "least"), [("krum", 1, 5), ("multi_krum", 2, 7), ("median", 1, 3), ("geometric_median", 2, 5)]
)
@pytest.mark.parametrize("over_select", [1.0, 3.0])
def test_robust_rule_needs_its_sites_however_many_more_are_asked(
    tmp_path: Path, robust: str, bad: int, least: int, over_select: float
) -> None:
    aggregation = {"robust": robust, "robust_sites": bad}
    made = steered(tmp_path, aggregation=aggregation, federation={"sites_per_round": 9, "over_select": over_select})
    expect_refused(made, str(least - 1), f"needs {least}")
    made.set("sites_per_round", str(least))
    assert made.sites_per_round(9) == least


def test_async_mode_needs_as_many_sites_at_work_as_fill_the_buffer(tmp_path: Path) -> None:
    made = steered(tmp_path, federation={"mode": "async", "buffer_size": 3, "sites_per_round": 6})
    expect_refused(made, "2", "buffer_size 3 is above sites_per_round 2")
    made.set("sites_per_round", "3")
    assert made.sites_per_round(6) == 3


def test_async_mode_is_complete_with_the_buffer_that_its_robust_rule_was_checked_for(tmp_path: Path) -> None:
    federation = {"mode": "async", "buffer_size": 5, "sites_per_round": 8}
    made = steered(tmp_path, federation=federation, aggregation={"robust": "krum"})
    made.set("sites_per_round", "6")
    assert made.sites_per_round(8) == 6


def test_over_selection_closes_a_round_at_what_is_set_so_min_sites_bounds_it(tmp_path: Path) -> None:
    made = steered(tmp_path, federation={"sites_per_round": 6, "over_select": 2.0, "min_sites": 4})
    expect_refused(made, "3", "below min_sites 4")
    made.set("sites_per_round", "4")
    made.set("sites_per_round", "all")
    assert made.sites_per_round(6) == 6


def test_refusal_leaves_what_was_set_before(tmp_path: Path) -> None:
    made = steered(tmp_path, aggregation={"robust": "krum"})
    made.set("sites_per_round", "6")
    with pytest.raises(ConfigError, match="needs 5"):
        made.set("sites_per_round", "3")
    assert steered(tmp_path, aggregation={"robust": "krum"}).settings == Settings(sites_per_round=6)
