"""The model card says what the run did and claims, and names no site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import common.models.export
from common.config.run import RunConfig
from common.run_folder import RunFolder
from server.model_card import model_card
from simulations.run import simulate


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, ["LoRA factors of rank 2", "No differential privacy", "Nothing was accounted", "heart, skin, bones"]),
        ({"privacy": {"unit": "example", "noise_multiplier": 1.0}}, ["Example-level", "spent most: ε = "]),
        ({"privacy": {"unit": "site", "noise_multiplier": 1.0, "delta": 0.01}}, ["Site-level", "whole sites: ε = "]),
        ({"aggregation": {"method": "flora"}}, ["aggregated by flora"]),
        ({"aggregation": {"method": "fedsa_lora"}}, ["with the factors that it keeps, which are not in this adapter"]),
        ({"adapter": {"kind": "head_only"}, "evaluation": {"enabled": False}}, ["head alone", "Not evaluated"]),
    ],
    ids=["plain", "example", "site", "correction", "personal", "head only"],
)
def test_card_holds_claim_and_figures_and_no_site(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any],
    words: list[str],
) -> None:  # fmt: skip
    config = make_config(**sections)
    summary = simulate(config, tmp_path / "run")
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in (*words, summary["privacy_claim"], summary["base_fingerprint"]):
        assert word in card
    assert not any(site in card for site in summary["sites"])
    assert summary["personal"] == (config.aggregation.method == "fedsa_lora")
    if summary["personal"]:  # which only a simulation sees
        apart = model_card(config, summary | {"personal": False}, config.adapter)
        assert "Each has factors of its own, which are zero here" in apart
    if config.adapter.kind == "lora":
        settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
        assert (settings["r"] > 2) == (config.aggregation.method == "flora")
        code = card.partition("## Use")[2].split("`")[1]
        monkeypatch.chdir(tmp_path / "run")
        assert code.startswith("common.models.export.load_adapter(")
        loaded = eval(code, {"common": common, "BASE": config.model.source})  # noqa: S307 - what a reader types
        assert loaded.settings.r == settings["r"]
        assert f"rank {settings['r']}, alpha {settings['lora_alpha']:g}" in card
    if config.adapter.kind == "head_only":
        first = next(RunFolder(tmp_path / "run").iterate_records("round"))
        assert min(first["products"]["update_norms"].values()) > 0  # of the head, where there are no factors
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
