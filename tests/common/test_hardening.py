"""What a review found: odd but legal input, and input that must end in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.config.yaml_text import parse_yaml
from common.data.examples import Example
from common.data.readers import read_examples
from common.errors import ConfigError, DataError, ModelError, RunError
from common.models.adapter import adapt, initial_adapter
from common.models.base import choose_device, load_base
from common.run_folder import RunFolder
from common.tasks import causal_lm
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

CPU = torch.device("cpu")
BASE = "model: {source: m}\ndata: {task: classification, train: t.jsonl, labels: [a, b]}\n"


@pytest.mark.parametrize(
    "text",
    ["a: \x01", "a: !!bool maybe", "!!int abc: 1", "a: &x [1]\nb: *x", "a: !!python/object:os.system x", "a: [" * 2000],
)
def test_odd_yaml_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("1:30", "1:30"), ("0x10", "0x10"), ("1_000", "1_000")])
def test_integers_are_decimal_digits(text: str, value: object) -> None:
    assert parse_yaml(f"a: {text}", "x").values["a"] == value


def test_control_character_in_an_override_is_text_or_refused() -> None:
    with pytest.raises(ConfigError):
        parse_run_config(BASE, "run.yaml", None, ["training.lr=\x01"])


def test_paths_in_a_whole_section_override_are_anchored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = "data={task: classification, train: rel.jsonl, labels: [a, b]}"
    assert parse_run_config(BASE, "x", Path("/base"), [section]).data.train == str(tmp_path / "rel.jsonl")


def test_labels_that_read_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="label twice"):
        parse_run_config(BASE.replace("[a, b]", "[1, '1']"), "x", None)


def test_odd_data_paths_are_one_line(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    data = make_config().data
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source in (str(tmp_path / "pipe.jsonl"), "a\0b.jsonl", "x" * 300 + ".jsonl", "/dev/null"):
        with pytest.raises(DataError, match="expected"):
            read_examples(source, data, "data.train")
    with pytest.raises(ConfigError, match="not installed"):
        read_examples("package:__main__/x.jsonl", data, "data.train")


def test_data_behind_a_link_keeps_its_own_name(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    blob = tmp_path / "0a1b2c"
    blob.write_text(json.dumps({"text": "x", "label": "heart"}) + "\n")
    (tmp_path / "rows.jsonl").symlink_to(blob)
    assert len(read_examples(str(tmp_path / "rows.jsonl"), make_config().data, "data.train")) == 1


def test_mixed_chat_and_prompt_rows_are_each_tokenised_their_way(make_config: Callable[..., RunConfig]) -> None:
    data = make_config("llama", "causal_lm").data
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = Example("", messages=(("user", "the knee"), ("assistant", "rest")))
    prompt = Example("the hip ", "call")
    mixed = causal_lm.tokenise([chat, prompt, chat], tokenizer, data)
    apart = [causal_lm.tokenise([example], tokenizer, data)[0] for example in (chat, prompt, chat)]
    for first, second in zip(mixed, apart, strict=True):
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.targets, second.targets)


def test_chat_the_template_refuses_is_one_line(make_config: Callable[..., RunConfig]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    chat = Example("", messages=(("user", "the knee"), ("assistant", "rest")))
    with pytest.raises(DataError, match="chat template refuses"):
        causal_lm.tokenise([chat], tokenizer, make_config("llama", "causal_lm").data)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlnet"])
def test_encoder_is_no_causal_language_model(make_config: Callable[..., RunConfig], family: str) -> None:
    config = make_config(family, "causal_lm")
    with pytest.raises(ModelError, match="cannot be tuned for causal_lm"):
        load_base(config.model, config.data, CPU)


@pytest.mark.parametrize(("family", "most"), [("bert", 64), ("roberta", 62), ("gpt2", 64), ("distilbert", 64)])
def test_more_tokens_than_positions_are_refused(make_config: Callable[..., RunConfig], family: str, most: int) -> None:
    load_base(*_parts(make_config(family, data={"max_length": most})))
    with pytest.raises(ModelError, match=f"has {most} positions"):
        load_base(*_parts(make_config(family, data={"max_length": most + 1})))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlnet", "gpt2", "llama"])
def test_pretrained_head_of_every_family_is_kept(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str
) -> None:
    source = make_config(family).model.source
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    config = make_config(family, model={"source": str(tmp_path / "tuned")})
    model = adapt(load_base(*_parts(config)), config.adapter, config.data, CPU)
    start = initial_adapter(model, 0)
    saved = tuned.state_dict()
    heads = [name for name in start if ".lora_" not in name]
    assert heads
    for name in heads:
        kept = saved[name.removeprefix("base_model.model.")]
        assert torch.equal(start[name], kept.bfloat16().float())  # as a base held in bfloat16 has it


@pytest.mark.parametrize("targets", [["word_embeddings"], ["query", "no_such_layer"]])
def test_targets_that_would_not_be_trained_are_refused(
    make_config: Callable[..., RunConfig], targets: list[str]
) -> None:
    config = make_config(adapter={"target_modules": targets})
    with pytest.raises(ModelError, match="target_modules"):
        adapt(load_base(*_parts(config)), config.adapter, config.data, CPU)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"quantization_config": {"quant_method": "gptq"}}]
)
def test_broken_model_config_is_one_line(
    make_config: Callable[..., RunConfig], tmp_path: Path, change: dict[str, object]
) -> None:
    config = make_config()
    folder = tmp_path / "broken"
    shutil.copytree(config.model.source, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ModelError) as caught:
        load_base(*_parts(make_config(model={"source": str(folder)})))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hpu", "meta", "xla"])
def test_device_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="not available"):
        choose_device(name)


def test_site_with_a_line_separator_in_its_name_does_not_cut_the_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.log({"kind": "round", "round": 1, "sites": {"a\u2028b": 1}})
    folder.log({"kind": "round", "round": 2})
    assert [record["round"] for record in folder.records()] == [1, 2]


def test_unusable_run_folder_path_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(RunError, match="expected a writable place"):
            RunFolder(path).create()


def _parts(config: RunConfig) -> tuple[object, ...]:
    return config.model, config.data, CPU
