"""Mean pooling: the classifier itself, its adapter, and what it is refused for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ModelError
from common.evaluation import Evaluator
from common.models.adapter import AdaptedModel, adapt, initial_adapter
from common.models.base import load_base
from common.models.export import export_adapter, load_adapter
from common.models.folder import weights_fingerprint
from common.models.pooled import MeanPooledClassifier, mean_over_tokens
from common.tensors import Tensors

CPU = torch.device("cpu")
ENCODERS = ["bert", "roberta", "distilbert"]
MEAN = {"pooling": "mean"}


def load(config: RunConfig) -> AdaptedModel:
    return adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU)


def randomised(model: AdaptedModel) -> Tensors:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) * 0.2 for name, value in model.state().items()}


def with_model(make_config: Callable[..., RunConfig], family: str, **model: object) -> RunConfig:
    source = make_config(family).model.source
    return make_config(family, model={"source": source, **MEAN, **model})


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(4, 30, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 1:] = 0, 0
    return ids * mask, mask


def test_mean_over_tokens_is_the_mean_of_those_that_exist() -> None:
    hidden = torch.randn(3, 4, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    mean = mean_over_tokens(hidden, mask)
    torch.testing.assert_close(mean[0], hidden[0].float().mean(dim=0))
    torch.testing.assert_close(mean[1], ((hidden[1, 0] + hidden[1, 3]) / 2).float())
    assert not mean[2].any()
    torch.testing.assert_close(mean_over_tokens(hidden, None), hidden.float().mean(dim=1))


def test_mean_is_float32_and_ignores_what_padding_holds() -> None:
    hidden = torch.full((1, 1000, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    hidden[0, 999] = float("nan")
    mask = torch.ones(1, 1000)
    mask[0, 999] = 0
    mean = mean_over_tokens(hidden, mask)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1.0 + 2**-7, rel=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_logits_are_the_head_on_the_mean_of_the_last_states(make_config: Callable[..., RunConfig], family: str) -> None:
    config = with_model(make_config, family)
    model = load(config)
    start = initial_adapter(model, 0)
    model.load(start)
    model.module.eval()
    encoder = transformers.AutoModel.from_pretrained(config.model.source)
    ids, mask = padded_batch()
    weight = start["base_model.model.classifier.weight"]
    with torch.no_grad():
        logits = model.logits(ids, mask)
        for row in range(3):
            states = encoder(input_ids=ids[row : row + 1, : int(mask[row].sum())]).last_hidden_state
            torch.testing.assert_close(logits[row], weight @ states[0].mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_head_is_new_seeded_and_the_only_one(make_config: Callable[..., RunConfig], family: str) -> None:
    config = with_model(make_config, family)
    one, other = initial_adapter(load(config), 1), initial_adapter(load(config), 1)
    heads = {name for name in one if ".lora_" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["base_model.model.classifier.weight"].std() == pytest.approx(0.3, rel=0.4)
    assert not torch.equal(
        one["base_model.model.classifier.weight"], initial_adapter(load(config), 2)[min(heads)[:-4] + "weight"]
    )
    frozen = [p for name, p in load(config).module.named_parameters() if ".default." not in name]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_head_of_a_checkpoint_is_not_taken_and_its_pooler_not_needed(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    source = make_config().model.source
    shutil.copytree(source, tmp_path / "tuned")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    del tuned.bert.pooler
    tuned.bert.pooler = None
    tuned.save_pretrained(tmp_path / "tuned")
    plain, same = (
        load(with_model(make_config, "bert")),
        load(with_model(make_config, "bert", source=str(tmp_path / "tuned"))),
    )
    first, second = initial_adapter(plain, 0), initial_adapter(same, 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain.load(first)
    same.load(first)
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(*padded_batch()), same.logits(*padded_batch()))


@pytest.mark.parametrize("target_modules", ["auto", "all-linear"])
@pytest.mark.parametrize("family", ENCODERS)
def test_exported_adapter_loads_to_the_same_logits(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str, target_modules: str
) -> None:
    source = make_config(family).model.source
    config = make_config(
        family, model={"source": source, **MEAN}, adapter={"rank": 2, "target_modules": target_modules}
    )
    model = load(config)
    adapter = randomised(model)
    export_adapter(model, adapter, config, tmp_path / "adapter")
    model.load(adapter)
    model.module.eval()
    ids, mask = padded_batch()
    loaded = load_adapter(tmp_path / "adapter", source, "cpu")
    plain = MeanPooledClassifier(transformers.AutoModel.from_pretrained(source), 3)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.logits(ids, mask)
        assert torch.equal(loaded.logits(ids, mask), expected)
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, expected)
    about = json.loads((tmp_path / "adapter" / "fedtune.json").read_text())
    assert about["pooling"] == "mean"
    assert about["base_fingerprint"] == weights_fingerprint(Path(source))


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_load_adapter_takes_what_other_poolings_export(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str, task: str
) -> None:
    config = make_config(family, task)
    model = load(config)
    adapter = randomised(model)
    export_adapter(model, adapter, config, tmp_path / "adapter")
    model.load(adapter)
    model.module.eval()
    with torch.no_grad():
        expected = model.logits(*padded_batch())
        assert torch.equal(
            load_adapter(tmp_path / "adapter", config.model.source, "cpu").logits(*padded_batch()), expected
        )


def test_load_adapter_refuses_what_does_not_belong_together(
    make_config: Callable[..., RunConfig], tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = with_model(make_config, "bert")
    model = load(config)
    export_adapter(model, randomised(model), config, tmp_path / "adapter")
    with pytest.raises(ModelError, match="trained on"):
        load_adapter(tmp_path / "adapter", tiny_models["roberta"], "cpu")
    with pytest.raises(ModelError, match="no usable adapter folder"):
        load_adapter(tmp_path, tiny_models["bert"], "cpu")
    with pytest.raises(ModelError, match="hub id"):
        load_adapter(tmp_path / "adapter", "hub:owner/name", "cpu")
    about = json.loads((tmp_path / "adapter" / "fedtune.json").read_text())
    about["adapter"]["rank"] = 3
    (tmp_path / "adapter" / "fedtune.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="other tensors"):
        load_adapter(tmp_path / "adapter", tiny_models["bert"], "cpu")


def test_logits_do_not_depend_on_padding(make_config: Callable[..., RunConfig]) -> None:
    config = with_model(make_config, "bert")
    model = load(config)
    test = load_federated_data(config.data, config.seed).test
    adapter = randomised(model)
    alone = Evaluator(model, config, {"site 0": test["site 0"][:1]})(adapter)
    longer = Evaluator(model, config, {"site 0": test["site 0"][:1], "site 1": test["site 1"]})(adapter)
    assert alone.by_site["site 0"]["loss"] == pytest.approx(longer.by_site["site 0"]["loss"], abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_tensor_gets_a_gradient(
    make_config: Callable[..., RunConfig], dtype: str, checkpointing: bool
) -> None:
    model = load(with_model(make_config, "bert", dtype=dtype, gradient_checkpointing=checkpointing))
    model.load(randomised(model))
    model.module.train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.module.modules()) == checkpointing
    model.logits(*padded_batch()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters.values())


def test_head_only_computes_no_gradient_of_the_encoder(make_config: Callable[..., RunConfig]) -> None:
    model = load(with_model(make_config, "bert"))
    model.train_only(frozenset(name for name in model.parameters if ".lora_" not in name))
    ids, mask = padded_batch()
    base = model.base.module
    assert isinstance(base, MeanPooledClassifier)
    assert not base.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.requires_grad


def test_classifier_is_one_of_transformers_kind(tiny_models: dict[str, Path]) -> None:
    model = MeanPooledClassifier(transformers.AutoModel.from_pretrained(tiny_models["bert"]), 3).eval()
    torch.nn.init.normal_(model.classifier.weight)
    ids, mask = padded_batch()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2])))
    torch.testing.assert_close(embedded.logits, output.logits)
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("family", ["xlnet", "gpt2", "llama"])
def test_family_without_mean_pooling_is_refused(make_config: Callable[..., RunConfig], family: str) -> None:
    config = with_model(make_config, family)
    with pytest.raises(ModelError, match=r"model\.pooling is 'mean'"):
        load_base(config.model, config.data, CPU)


def test_mean_pooling_of_a_language_model_is_refused(make_config: Callable[..., RunConfig]) -> None:
    for family, rule in (("llama", r"model\.pooling is 'mean'"), ("bert", "cannot be tuned for causal_lm")):
        config = make_config(family, "causal_lm")
        with pytest.raises(ModelError, match=rule):
            load_base(config.model.model_copy(update=MEAN), config.data, CPU)


def test_more_tokens_than_positions_are_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data={"max_length": 65})
    with pytest.raises(ModelError, match="has 64 positions"):
        load_base(config.model.model_copy(update=MEAN), config.data, CPU)
