"""Real models on real data, for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_run_config
from simulations.run import simulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.slow
@pytest.mark.shared
def test_tiny_llama_lowers_its_perplexity_on_medical_answers(tmp_path: Path) -> None:
    overrides = ["federation.rounds=2", "training.local_steps=8", "data.max_test_rows=60", "evaluation.every=0"]
    summary = simulate(load_run_config(CONFIGS / "medquad-tiny.yaml", overrides), tmp_path / "run")
    before, after = (summary[part]["test"]["overall"]["perplexity"] for part in ("metrics_before", "metrics_after"))
    assert 100 < before < 200
    assert after < 0.75 * before


@pytest.mark.slow
@pytest.mark.shared
def test_product_reviews_by_product_learns(tmp_path: Path) -> None:
    overrides = ["federation.rounds=2", "data.max_rows_per_site=48", "data.max_test_rows=200", "evaluation.every=0"]
    summary = simulate(load_run_config(CONFIGS / "product-reviews.yaml", overrides), tmp_path / "run")
    before, after = (summary[part]["test"]["overall"]["loss"] for part in ("metrics_before", "metrics_after"))
    assert len(summary["sites"]) == 14
    assert after < before - 0.01
