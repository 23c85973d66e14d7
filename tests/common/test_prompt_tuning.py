"""Prompt tuning: what is trained, where it starts, and that its logits are PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.errors import ConfigError, ModelError
from common.methods import trained_names
from common.models.adapter import AdaptedModel, adapt, initial_adapter
from common.models.base import load_base
from common.models.export import export_adapter, load_adapter
from common.models.pooled import MeanPooledClassifier
from common.models.prompt import PROMPT
from common.tensors import Tensors, manifest_of

CPU = torch.device("cpu")
PROMPTED = {"kind": "prompt", "virtual_tokens": 3}
ENCODERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "llama", "qwen2")
SET_UPS = [
    *((family, "classification") for family in (*ENCODERS, *DECODERS)),
    *((family, "causal_lm") for family in DECODERS),
]


def load(config: RunConfig) -> AdaptedModel:
    return adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU)


def randomised(model: AdaptedModel) -> Tensors:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) * 0.2 for name, value in model.state().items()}


def evaluated(model: AdaptedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.logits(ids, mask)


def plain_base(config: RunConfig) -> Any:
    """The base model as a user would load it for PEFT."""
    if config.model.pooling == "mean":
        return MeanPooledClassifier(transformers.AutoModel.from_pretrained(config.model.source), 3)
    if config.data.task == "causal_lm":
        return transformers.AutoModelForCausalLM.from_pretrained(config.model.source)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.source, num_labels=3)
    base.config.pad_token_id = 0
    return base


@pytest.mark.parametrize(("family", "task"), SET_UPS)
def test_prompt_and_head_are_trained_under_the_names_peft_saves(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str, task: str
) -> None:
    config = make_config(family, task, adapter=PROMPTED)
    model = load(config)
    model.module.save_pretrained(str(tmp_path))  # type: ignore[operator]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert manifest_of(model.parameters) == manifest_of(saved)
    assert model.parameters[PROMPT].shape == (3, 16)
    assert (len(model.parameters) > 1) == (task == "classification")
    assert trained_names(config, model.parameters) == model.parameters.keys()
    trainable = [p for p in model.module.parameters() if p.requires_grad]
    assert len(trainable) == len(model.parameters)


@pytest.mark.parametrize(
    ("family", "task", "pooling"),
    [*((*set_up, "family") for set_up in SET_UPS), *((family, "classification", "mean") for family in ENCODERS)],
)
def test_exported_prompt_loads_in_peft_to_the_same_logits(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str, task: str, pooling: str
) -> None:
    source = make_config(family, task).model.source
    config = make_config(family, task, model={"source": source, "pooling": pooling}, adapter=PROMPTED)
    model = load(config)
    adapter = randomised(model)
    export_adapter(model, adapter, config, tmp_path / "adapter")
    model.load(adapter)
    again = peft.PeftModel.from_pretrained(plain_base(config), tmp_path / "adapter").eval()
    torch.manual_seed(1)
    ids = torch.randint(4, 30, (3, 9))
    mask = torch.ones_like(ids)
    expected = evaluated(model, ids, mask)
    with torch.no_grad():
        logits = again(input_ids=ids, attention_mask=mask).logits
    if task == "causal_lm":
        assert logits.shape[1] == 9 + 3
        logits = logits[:, 3:]
    torch.testing.assert_close(logits, expected)
    assert torch.equal(evaluated(load_adapter(tmp_path / "adapter", source, "cpu"), ids, mask), expected)


@pytest.mark.parametrize(("family", "task"), SET_UPS)
def test_logits_do_not_depend_on_padding(make_config: Callable[..., RunConfig], family: str, task: str) -> None:
    config = make_config(family, task, adapter=PROMPTED)
    model = load(config)
    model.load(randomised(model))
    torch.manual_seed(1)
    ids = torch.randint(4, 30, (2, 9))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    together = evaluated(model, ids, mask)
    alone = evaluated(model, ids[1:, :4], mask[1:, :4])
    own = together[1:, :4] if task == "causal_lm" else together[1:]
    torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)
    assert together.shape == ((2, 9, len(model.base.tokenizer)) if task == "causal_lm" else (2, 3))


def test_prompt_changes_logits_and_a_prompt_of_text_is_that_text(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("llama", "causal_lm", adapter=PROMPTED)
    model = load(config)
    table = model.base.module.get_input_embeddings().weight  # type: ignore[operator]
    words, ids = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11]])
    model.load({PROMPT: table[words[0]]})
    with torch.no_grad():
        whole = plain_base(config)(input_ids=torch.cat([words, ids], dim=1)).logits
    torch.testing.assert_close(evaluated(model, ids, torch.ones_like(ids)), whole[:, 3:])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_initial_prompt_is_words_of_the_vocabulary_drawn_by_the_seed(
    make_config: Callable[..., RunConfig], dtype: str
) -> None:
    source = make_config("gpt2").model.source
    config = make_config("gpt2", model={"source": source, "dtype": dtype}, adapter=PROMPTED)
    exact = make_config("gpt2", adapter=PROMPTED)
    first, again, other = (initial_adapter(load(c), seed) for c, seed in ((config, 1), (exact, 1), (config, 2)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[PROMPT], other[PROMPT])
    table = load(exact).base.module.get_input_embeddings().weight.detach()  # type: ignore[operator]
    distances = torch.cdist(first[PROMPT], table)
    assert bool((distances.min(dim=1).values < 0.02).all())
    assert bool((distances.argmin(dim=1) >= 4).all())  # no special token
    assert first[PROMPT].dtype == torch.float32


def test_positions_are_those_of_prompt_and_row(make_config: Callable[..., RunConfig]) -> None:
    assert load(make_config(data={"max_length": 61}, adapter=PROMPTED))
    with pytest.raises(ModelError, match=r"max_length is 62 and adapter\.virtual_tokens 3 but the model has 64"):
        load(make_config(data={"max_length": 62}, adapter=PROMPTED))
    assert load(make_config("llama", data={"max_length": 4000}, adapter=PROMPTED))


def test_left_padded_family_is_refused(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ModelError, match="padded on the left"):
        load(make_config("xlnet", adapter=PROMPTED))


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"kind": "prompt", "dropout": 0.1}},
        {"adapter": {"kind": "prompt", "target_modules": ["query"]}},
        {"adapter": {"kind": "prompt", "virtual_tokens": 0}},
        {"adapter": {"kind": "prompt"}, "aggregation": {"method": "ffa_lora"}},
    ],
    ids=["dropout", "targets", "no tokens", "ffa_lora"],
)
def test_settings_that_a_prompt_has_no_use_for_are_refused(
    make_config: Callable[..., RunConfig], sections: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"expected|remove|greater"):
        make_config(**sections)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
@pytest.mark.parametrize("model_section", [{"dtype": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_every_adapter_tensor_gets_a_gradient(
    make_config: Callable[..., RunConfig], family: str, task: str, model_section: dict[str, Any]
) -> None:
    source = make_config(family, task).model.source
    model = load(make_config(family, task, model={"source": source, **model_section}, adapter=PROMPTED))
    model.load(randomised(model))
    model.module.train()
    ids = torch.randint(4, 30, (2, 5))
    model.logits(ids, torch.ones_like(ids)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters.values())
