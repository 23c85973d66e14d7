"""A merged model gives the logits of base and adapter, loaded by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from common.config.run import RunConfig
from common.errors import ModelError
from common.models.export import export_adapter, load_adapter
from common.models.merge import merge_adapter
from tests.common.test_side_paths import IDS, load, logits, randomised, with_corrections


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_merged_model_has_the_logits_of_the_adapter_with_its_correction(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str
) -> None:
    config = make_config(family)
    model = load(config)
    whole = with_corrections(randomised(model), 2)
    wanted = logits(model, whole)
    export_adapter(model, whole, config, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", config.model.source, tmp_path / "merged", "cpu")
    auto: Any = transformers.AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged", use_safetensors=True).eval()
    with torch.no_grad():
        got = merged(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())
    transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with pytest.raises(ModelError, match="not empty"):
        merge_adapter(tmp_path / "adapter", config.model.source, tmp_path / "merged", "cpu")


@pytest.mark.parametrize("sections", [{"adapter": {"kind": "prompt"}}, {"model": {"pooling": "mean"}}])
def test_what_no_model_class_holds_is_not_merged(
    make_config: Callable[..., RunConfig], tmp_path: Path, sections: dict[str, Any]
) -> None:
    source = make_config().model.source
    config = make_config(**({"model": {"source": source, **sections["model"]}} if "model" in sections else sections))
    model = load(config)
    export_adapter(model, model.state(), config, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", source, "cpu")
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapter(tmp_path / "adapter", source, tmp_path / "merged", "cpu")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of both, and goes on
def test_factors_on_a_weight_that_two_layers_share_are_not_merged(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config("gpt2", "causal_lm", adapter={"rank": 2, "alpha": 4, "target_modules": ["c_attn", "lm_head"]})
    model = load(config)
    export_adapter(model, randomised(model), config, tmp_path / "adapter")
    with pytest.raises(ModelError, match="factors on lm_head, whose weight another layer shares"):
        merge_adapter(tmp_path / "adapter", config.model.source, tmp_path / "merged", "cpu")
    assert not (tmp_path / "merged").exists()
