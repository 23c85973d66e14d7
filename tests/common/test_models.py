from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ModelError
from common.evaluation import Evaluator
from common.factor_names import is_factor
from common.methods import trained_names
from common.models.adapter import AdaptedModel, adapt, initial_adapter
from common.models.base import choose_device, load_base
from common.models.export import export_adapter
from common.models.folder import weights_fingerprint
from common.models.resident import resident_model
from common.tensors import Tensors, fingerprint
from tests.tiny_models import CAUSAL, FAMILIES

CPU = torch.device("cpu")


def load(config: RunConfig) -> AdaptedModel:
    return adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU)


def randomised(model: AdaptedModel) -> Tensors:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) * 0.2 for name, value in model.state().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_factors_and_head_and_freezes_the_rest(
    make_config: Callable[..., RunConfig], family: str
) -> None:
    model = load(make_config(family))
    trainable = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert len(trainable) == len(model.parameters) > 0
    assert all(p.dtype == torch.float32 for p in model.parameters.values())
    assert any(".lora_A." in name for name in model.parameters)
    assert any(".lora_" not in name for name in model.parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_padding(make_config: Callable[..., RunConfig], family: str) -> None:
    config = make_config(family)
    model = load(config)
    test = load_federated_data(config.data, config.seed).test
    evaluator = Evaluator(model, config, test)
    adapter = randomised(model)
    together = evaluator(adapter)
    alone = Evaluator(model, config, {"site 0": test["site 0"][:1]})(adapter)
    longer = Evaluator(model, config, {"site 0": test["site 0"][:1], "site 1": test["site 1"]})(adapter)
    assert alone.by_site["site 0"]["loss"] == pytest.approx(longer.by_site["site 0"]["loss"], abs=1e-5)
    assert set(together.by_site) == set(test)


def test_personal_tensors_are_used_on_their_site_and_not_held(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("bert")
    model = load(config)
    test = load_federated_data(config.data, config.seed).test
    evaluator, adapter = Evaluator(model, config, test), randomised(model)
    other = {name: -value for name, value in adapter.items()}
    last = evaluator.sites[-1]
    held: list[weakref.ref[torch.Tensor]] = []

    def personal(site: str) -> Tensors:
        assert sum(one() is not None for one in held) <= 1  # that of the site before
        own = {} if site == last else {name: value.clone() for name, value in other.items()}
        held.extend(weakref.ref(value) for value in list(own.values())[:1])
        return own

    found, common, changed = evaluator(adapter, personal), evaluator(adapter), evaluator(other)
    assert len(held) == len(evaluator.sites) - 1 > 1
    for site in evaluator.sites:
        expected = common if site == last else changed
        assert found.by_site[site] == pytest.approx(expected.by_site[site], abs=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exported_adapter_reloads_in_peft_to_the_same_logits(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str
) -> None:
    config = make_config(family)
    model = load(config)
    adapter = randomised(model)
    export_adapter(model, adapter, config, tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.source, num_labels=3)
    base.config.pad_token_id = 0
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    model.load(adapter)
    model.module.eval()
    ids = torch.randint(4, 30, (3, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids, mask), again(input_ids=ids, attention_mask=mask).logits)
    about = json.loads((tmp_path / "adapter" / "fedtune.json").read_text())
    assert about["labels"] == ["heart", "skin", "bones"]
    assert about["base_fingerprint"] == weights_fingerprint(Path(config.model.source))
    assert sorted(path.name for path in tmp_path.glob("*dapter*")) == ["adapter"]


def test_causal_adapter_reloads_and_generates(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for family in sorted(CAUSAL):
        config = make_config(family, "causal_lm", adapter={"target_modules": "all-linear"})
        model = load(config)
        export_adapter(model, randomised(model), config, tmp_path / family)
        base = transformers.AutoModelForCausalLM.from_pretrained(config.model.source)
        again = peft.PeftModel.from_pretrained(base, tmp_path / family)
        made = again.generate(input_ids=torch.tensor([[2, 5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape[1] > 3


def test_initial_adapter_repeats_and_starts_at_the_base(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("llama", "causal_lm")
    model, other = load(config), load(config)
    first, again, third = initial_adapter(model, 1), initial_adapter(other, 1), initial_adapter(model, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    ids = torch.tensor([[2, 5, 6, 7]])
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.source)
    model.load(first)
    model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids, torch.ones_like(ids)), base(input_ids=ids).logits)


def test_pretrained_head_is_the_start_of_the_head(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    source = make_config().model.source
    shutil.copytree(source, folder)
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    torch.nn.init.constant_(tuned.classifier.weight, 0.25)
    tuned.save_pretrained(folder)
    start = initial_adapter(load(make_config(model={"source": str(folder)})), 0)
    assert torch.equal(start["base_model.model.classifier.weight"], torch.full((3, 16), 0.25))


@pytest.mark.parametrize(
    ("method", "kind", "absent"),
    [("fedit", "lora", ()), ("ffa_lora", "lora", (".lora_A.",)), ("fedit", "head_only", (".lora_A.", ".lora_B."))],
)
def test_method_sends_only_what_it_trains(
    make_config: Callable[..., RunConfig], method: str, kind: str, absent: tuple[str, ...]
) -> None:
    config = make_config(adapter={"kind": kind}, aggregation={"method": method})
    model = load(config)
    names = trained_names(config, model.parameters)
    left_out = model.parameters.keys() - names
    assert all(any(part in name for part in absent) for name in left_out)
    assert not any(part in name for part in absent for name in names)


def test_unusable_model_folders_are_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    good = Path(make_config().model.source)

    def refused(folder: Path, rule: str) -> None:
        config = make_config(model={"source": str(folder)})
        with pytest.raises(ModelError, match=rule) as caught:
            load_base(config.model, config.data, CPU)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "does not exist")
    refused(good / "config.json", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    for name in ("bare", "pickled", "broken", "foreign", "partial"):
        shutil.copytree(good, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    refused(tmp_path / "bare", "no weights")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled", "pickled weights")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not a safetensors file")
    refused(tmp_path / "broken", "cannot be loaded")
    settings = json.loads((good / "config.json").read_text())
    shutil.copy(good / "model.safetensors", tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(settings | {"model_type": "t5"}))
    refused(tmp_path / "foreign", "not supported")
    weights = load_file(good / "model.safetensors")
    from safetensors.torch import save_file

    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "partial", "lack")


def test_core_between_more_singular_vectors_than_there_are_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"rank": 200}, aggregation={"method": "fed_sb"})
    model = adapt(load_base(config.model, config.data, CPU), config.adapter, config.data, CPU, core=True)
    with pytest.raises(ModelError, match=r"adapter\.rank 200 is above 16, the smaller side of layer"):
        initial_adapter(model, 0)


def test_wrong_target_modules_and_devices_are_refused(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ModelError, match="do not fit the model"):
        load(make_config(adapter={"target_modules": ["no_such_layer"]}))
    for name in ("cuda:99", "quantum"):
        with pytest.raises(ModelError, match="not available"):
            choose_device(name)
    if not torch.cuda.is_available():
        config = make_config(model={"quantization": "4bit"})
        with pytest.raises(ModelError, match="needs CUDA"):
            load_base(config.model, config.data, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_keeps_a_float32_adapter_and_gives_about_the_logits(
    make_config: Callable[..., RunConfig], family: str
) -> None:
    source = make_config(family).model.source
    exact, model = load(make_config(family)), load(make_config(family, model={"source": source, "dtype": "bf16"}))
    assert all(p.dtype == torch.float32 for p in model.parameters.values())
    frozen = [p for name, p in model.module.named_parameters() if ".default." not in name]
    assert torch.bfloat16 in {p.dtype for p in frozen}
    adapter = randomised(exact)
    exact.load(adapter)
    model.load(adapter)
    torch.manual_seed(2)
    ids = torch.randint(4, 30, (4, 5))
    logits, expected = model.logits(ids, torch.ones_like(ids)), exact.logits(ids, torch.ones_like(ids)).detach()
    assert logits.dtype == torch.float32
    assert float((logits.detach() - expected).norm() / expected.norm()) < 0.05
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters.values())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_bf16_base_starts_from_the_same_adapter_also_with_a_head_of_the_checkpoint(
    make_config: Callable[..., RunConfig], tiny_models: dict[str, Path], tmp_path: Path, family: str, method: str
) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    torch.manual_seed(3)
    whole = auto.from_pretrained(tiny_models[family], num_labels=3)
    whole.save_pretrained(tmp_path / "whole")
    transformers.AutoTokenizer.from_pretrained(tiny_models[family]).save_pretrained(tmp_path / "whole")
    starts = []
    for dtype in ("fp32", "bf16"):
        model = {"source": str(tmp_path / "whole"), "dtype": dtype}
        config = make_config(family, model=model, aggregation={"method": method})
        starts.append(initial_adapter(resident_model(config, "cpu"), 0))
        head = next(value for name, value in starts[-1].items() if not is_factor(name) and value.dim() > 1)
        assert any(torch.equal(head, value.bfloat16().float()) for value in whole.state_dict().values())
    assert fingerprint(starts[0]) == fingerprint(starts[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_a_run_starts_from_the_same_adapter_on_a_cpu_that_can_less(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    config = make_config(aggregation={"method": method})
    (tmp_path / "run.yaml").write_bytes(dump_run_config(config).encode())
    code = (
        "import sys, torch; from pathlib import Path; from common.config.load import load_run_config;"
        "from common.models.adapter import initial_adapter; from common.models.resident import resident_model;"
        "from common.tensors import fingerprint; config = load_run_config(Path(sys.argv[1]));"
        "print(torch.backends.cpu.get_cpu_capability(), fingerprint(initial_adapter(resident_model(config, 'cpu'), 0)))"
    )
    less = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")], env=less, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-2:] == ["DEFAULT", fingerprint(initial_adapter(resident_model(config, "cpu"), 0))]


def test_fingerprint_follows_the_weights(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    assert weights_fingerprint(tiny_models["bert"]) != weights_fingerprint(tiny_models["roberta"])
    shutil.copytree(tiny_models["bert"], tmp_path / "copy")
    assert weights_fingerprint(tmp_path / "copy") == weights_fingerprint(tiny_models["bert"])
