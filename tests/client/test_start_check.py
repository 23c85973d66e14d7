"""The self-test passes on what is sound and catches what is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import client.dp.capture
import client.dp.step
import client.start_check
from client.start_check import self_test
from common.config.run import RunConfig
from common.errors import PrivacyError
from common.models.resident import resident_model

PRIVATE = {"unit": "example", "noise_multiplier": 1.0}


@pytest.fixture(autouse=True)
def _afresh() -> None:
    self_test.cache_clear()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("method", ["fedit", "ffa_lora"])
def test_sound_set_up_passes_and_is_left_as_it_was(
    make_config: Callable[..., RunConfig], family: str, method: str
) -> None:
    config = make_config(family, privacy=PRIVATE, aggregation={"method": method}, adapter={"dropout": 0.2})
    model = resident_model(config)
    before = model.state()
    assert self_test(model, config) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())


def test_what_an_earlier_run_left_in_the_model_does_not_matter(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"kind": "head_only"}, privacy=PRIVATE)
    model = resident_model(config)
    kept = model.state()
    # A head so sure of itself that a right answer has no gradient in float32.
    model.load({name: 1e5 * value for name, value in kept.items()})
    self_test(model, config)
    assert all(torch.equal(value, 1e5 * kept[name]) for name, value in model.state().items())


@pytest.mark.parametrize("kind", ["causal", "bf16", "head only", "checkpointing", "mean", "upper"])
def test_other_set_ups_pass(make_config: Callable[..., RunConfig], kind: str) -> None:
    config = {
        "causal": lambda: make_config("llama", "causal_lm", privacy=PRIVATE),
        "bf16": lambda: make_config(model={"dtype": "bf16"}, privacy=PRIVATE),
        "head only": lambda: make_config(adapter={"kind": "head_only"}, privacy=PRIVATE),
        "checkpointing": lambda: make_config(model={"gradient_checkpointing": True}, privacy=PRIVATE),
        "mean": lambda: make_config(model={"pooling": "mean"}, privacy=PRIVATE),
        "upper": lambda: make_config(adapter={"target_modules": ["layer.1.output.dense"]}, privacy=PRIVATE),
    }[kind]()
    self_test(resident_model(config), config)


Optimizer = client.dp.step._NoisyOptimizer


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    clip, noise, leave = Optimizer.clip_and_accumulate, Optimizer.add_noise, client.dp.capture.leave
    decode = client.start_check.decode

    def no_clip(self: Optimizer) -> None:
        self._clip.value *= 1e6
        clip(self)
        self._clip.value /= 1e6

    def double_clip(self: Optimizer) -> None:
        self._clip.value *= 2
        clip(self)
        self._clip.value /= 2

    def mixed(parameter: Any, grad_sample: torch.Tensor) -> None:
        leave(parameter, grad_sample.mean(dim=0, keepdim=True).expand_as(grad_sample).contiguous())

    def lost(parameter: Any, grad_sample: torch.Tensor) -> None:
        if grad_sample.dim() == 3:
            leave(parameter, grad_sample)

    def no_noise(self: Optimizer) -> None:
        std, self.noise_multiplier = self.noise_multiplier, 0.0
        noise(self)
        self.noise_multiplier = std
        for parameter in self.params:
            parameter.grad.zero_()

    def half_noise(self: Optimizer) -> None:
        self.noise_multiplier /= 2
        noise(self)
        self.noise_multiplier *= 2

    def corrupt(*arguments: Any) -> Any:
        return {name: value + 1e-2 for name, value in decode(*arguments).items()}

    target: dict[str, tuple[Any, str, Any]] = {
        "no clipping": (Optimizer, "clip_and_accumulate", no_clip),
        "twice the clip": (Optimizer, "clip_and_accumulate", double_clip),
        "records mixed": (client.dp.capture, "leave", mixed),
        "gradient lost": (client.dp.capture, "leave", lost),
        "nothing moves": (Optimizer, "add_noise", no_noise),
        "half noise": (Optimizer, "add_noise", half_noise),
        "corrupt packing": (client.start_check, "decode", corrupt),
    }
    patch.setattr(*target[fault])


@pytest.mark.parametrize(
    "fault",
    [
        "no clipping",
        "twice the clip",
        "records mixed",
        "gradient lost",
        "nothing moves",
        "half noise",
        "corrupt packing",
    ],
)
def test_planted_fault_is_caught(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    config = make_config(privacy=PRIVATE)
    model = resident_model(config)
    before = model.state()
    plant(monkeypatch, fault)
    with pytest.raises(PrivacyError):
        self_test(model, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_packing_is_tested_with_the_codec_of_the_run(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    config = make_config(privacy=PRIVATE, communication={"codec": codec, "down": "fp32", "zstd": 1})
    self_test(resident_model(config), config)
    self_test.cache_clear()
    bounds = client.start_check.largest_errors
    monkeypatch.setattr(
        client.start_check, "largest_errors", lambda *given: {n: 0.01 * v for n, v in bounds(*given).items()}
    )
    with pytest.raises(PrivacyError, match="packed wrongly"):
        self_test(resident_model(config), config)
