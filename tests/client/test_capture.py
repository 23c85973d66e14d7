"""Captured per-example gradients against one backward pass an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from client.dp.capture import LARGEST_EMBEDDING, capturable_layers, captured_gradients
from client.dp.step import DpStep
from client.start_check import self_test
from common.config.run import RunConfig
from common.data.batches import Batch, Collator, TokenRow
from common.data.federated import load_federated_data
from common.errors import PrivacyError
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.randomness import CryptoStream
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm, subtract
from tests.mechanisms import mechanism_of

Losses = Callable[[], Tensor]
"""One loss an example, [B]; called afresh for every backward pass."""


def captured(module: nn.Module, losses: Losses) -> list[Tensors]:
    """Per-example gradients by capture, of one pass over all examples."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with captured_gradients(capturable_layers(module, parameters)):
        values = losses()
        values.sum().backward()
    found = {name: p.__dict__.pop("grad_sample") for name, p in parameters.items()}
    assert all(p.grad is None for p in parameters.values())
    return [{name: value[row] for name, value in found.items()} for row in range(len(values))]


def one_at_a_time(module: nn.Module, losses: Losses) -> list[Tensors]:
    """The same by definition: a forward and backward pass over the same batch for each example's loss alone."""
    gradients = []
    for row in range(len(losses())):
        module.zero_grad()
        losses()[row].backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    module.zero_grad()
    return gradients


def relative_error(found: Sequence[Tensors], expected: Sequence[Tensors]) -> float:
    assert all(one.keys() == other.keys() for one, other in zip(found, expected, strict=True))
    return max(l2_norm(subtract(one, other)) / l2_norm(other) for one, other in zip(found, expected, strict=True))


class Net(nn.Module):
    """A small model with layers of every kind: [B, T] ids to one loss an example."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, ids: Tensor, repeats: int = 1) -> Tensor:
        states = self.table(ids)
        for _ in range(repeats):
            states = torch.tanh(self.first(states))
        return self.second(states).square().mean(dim=(1, 2))


IDS = torch.tensor([[1, 2, 2, 3], [4, 0, 0, 0], [9, 9, 10, 1]])


@pytest.mark.parametrize("repeats", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("frozen", [(), ("table",), ("first", "second"), ("table", "second")])
def test_captured_gradients_are_those_of_single_examples(frozen: tuple[str, ...], repeats: int) -> None:
    net = Net()
    for name in frozen:
        net.get_submodule(name).requires_grad_(requires_grad=False)
    found, expected = (gradients(net, lambda: net(IDS, repeats)) for gradients in (captured, one_at_a_time))
    assert relative_error(found, expected) < 1e-6


def test_bias_alone_is_captured() -> None:
    net = Net().requires_grad_(requires_grad=False)
    net.first.bias.requires_grad_(requires_grad=True)
    found, expected = captured(net, lambda: net(IDS)), one_at_a_time(net, lambda: net(IDS))
    assert relative_error(found, expected) < 1e-6


def test_padding_entry_of_an_embedding_gets_no_gradient() -> None:
    net = Net(table=nn.Embedding(11, 6, padding_idx=0))
    found, expected = captured(net, lambda: net(IDS)), one_at_a_time(net, lambda: net(IDS))
    assert not found[1]["table.weight"][0].any()
    assert relative_error(found, expected) < 1e-6


def test_weight_shared_by_two_captured_layers_gets_the_sum() -> None:
    net = Net()
    net.second.weight = net.table.weight
    found, expected = captured(net, lambda: net(IDS)), one_at_a_time(net, lambda: net(IDS))
    assert relative_error(found, expected) < 1e-6


def test_weight_shared_with_a_layer_that_cannot_be_captured_is_refused_by_name() -> None:
    net = Net(table=nn.Embedding(LARGEST_EMBEDDING + 1, 6), second=nn.Linear(6, LARGEST_EMBEDDING + 1, bias=False))
    net.second.weight = net.table.weight
    with pytest.raises(
        PrivacyError, match=r"table.weight cannot be captured in table \(an embedding of 1025 entries\)"
    ):
        capturable_layers(net, dict(net.named_parameters()))


def test_gradient_past_the_captured_forward_is_refused() -> None:
    net = Net()
    layers = capturable_layers(net, dict(net.named_parameters()))
    with captured_gradients(layers), pytest.raises(PrivacyError, match="reached a parameter of first"):
        (net(IDS) + net.first.weight.square().sum()).sum().backward()


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.LayerNorm(6), "a LayerNorm"),
        (nn.Embedding(11, 6, max_norm=1.0), "max_norm"),
        (nn.Embedding(11, 6, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(6, 6), "NonDynamicallyQuantizableLinear"),
        (nn.Bilinear(6, 6, 6), "a Bilinear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layer_that_cannot_be_captured_is_refused_by_name(layer: nn.Module, rule: str) -> None:
    net = Net(odd=layer)
    with pytest.raises(PrivacyError, match=rf"gradients of odd\.weight cannot be captured in odd \(.*{rule}"):
        capturable_layers(net, dict(net.named_parameters()))
    layer.requires_grad_(requires_grad=False)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert list(capturable_layers(net, trained)) == ["table", "first", "second"]


def test_parameter_of_no_layer_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no layer of the model owns stray"):
        capturable_layers(Net(), {"stray": nn.Parameter(torch.zeros(2))})


def test_layers_are_as_before_after_capture_and_captured_once_at_a_time() -> None:
    net = Net()
    layers = capturable_layers(net, dict(net.named_parameters()))
    with captured_gradients(layers), pytest.raises(PrivacyError, match="replaced already"), captured_gradients(layers):
        pass
    assert not any("forward" in layer.__dict__ for layer in net.modules())
    net(IDS).sum().backward()
    assert all(p.grad is not None and not hasattr(p, "grad_sample") for p in net.parameters())


def test_nothing_is_captured_without_gradients() -> None:
    net = Net()
    with captured_gradients(capturable_layers(net, dict(net.named_parameters()))), torch.no_grad():
        assert not net(IDS).requires_grad


def rows_of(config: RunConfig, model: AdaptedModel, count: int) -> list[TokenRow]:
    examples = load_federated_data(config.data, config.seed).train["site 0"]
    return TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)[:count]


def losses_of(model: AdaptedModel, config: RunConfig, rows: Sequence[TokenRow]) -> Tensor:
    batch: Batch = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)(rows)
    return TASKS[config.data.task].loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask), batch)


def prepared(config: RunConfig) -> AdaptedModel:
    model = resident_model(config)
    torch.manual_seed(1)
    model.load({name: value + 0.1 * torch.randn_like(value) for name, value in initial_adapter(model, 0).items()})
    model.train_only(frozenset(model.parameters))
    model.module.train()
    return model


def rows_alone(model: AdaptedModel, config: RunConfig, rows: Sequence[TokenRow]) -> list[Tensors]:
    """Each row's gradient in a batch of its own, without padding."""
    return [one_at_a_time(model.module, lambda row=row: losses_of(model, config, [row]))[0] for row in rows]


SET_UPS = [
    ("bert", "classification", "prompt", "family"),
    ("roberta", "classification", "prompt", "family"),
    ("distilbert", "classification", "prompt", "family"),
    ("bert", "classification", "prompt", "mean"),
    ("bert", "classification", "lora", "mean"),
    ("gpt2", "classification", "prompt", "family"),
    ("llama", "classification", "prompt", "family"),
    ("gpt2", "causal_lm", "prompt", "family"),
    ("llama", "causal_lm", "prompt", "family"),
]

LORA_SET_UPS = [
    *((family, "classification", "lora", "family") for family in ("bert", "roberta", "distilbert", "gpt2", "llama")),
    *((family, "causal_lm", "lora", "family") for family in ("gpt2", "llama")),
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("family", "task", "kind", "pooling"), SET_UPS)
def test_gradients_are_those_of_rows_alone(
    make_config: Callable[..., RunConfig], family: str, task: str, kind: str, pooling: str, checkpointing: bool
) -> None:
    source = make_config(family, task).model.source
    model_section = {"source": source, "pooling": pooling, "gradient_checkpointing": checkpointing}
    config = make_config(family, task, model=model_section, adapter={"kind": kind, "virtual_tokens": 3})
    model = prepared(config)
    rows = rows_of(config, model, 5)
    assert len({len(row) for row in rows}) > 1 or task == "causal_lm"
    found = captured(model.module, lambda: losses_of(model, config, rows))
    assert relative_error(found, rows_alone(model, config, rows)) < 1e-5


@pytest.mark.parametrize(("family", "task", "kind", "pooling"), [*SET_UPS, *LORA_SET_UPS])
def test_bf16_base_gives_the_gradients_of_single_losses(
    make_config: Callable[..., RunConfig], family: str, task: str, kind: str, pooling: str
) -> None:
    adapter = {"kind": kind} | ({"target_modules": "all-linear"} if kind == "lora" else {})
    source = make_config(family, task).model.source
    config = make_config(family, task, model={"source": source, "pooling": pooling, "dtype": "bf16"}, adapter=adapter)
    model = prepared(config)
    rows = rows_of(config, model, 5)

    def losses() -> Tensor:
        return losses_of(model, config, rows)

    found = captured(model.module, losses)
    assert relative_error(found, one_at_a_time(model.module, losses)) < 1e-5
    # the base rounds to eight bits, and otherwise for other shapes: a row alone agrees to no more than this
    assert relative_error(found, rows_alone(model, config, rows)) < 0.05


@pytest.mark.parametrize(("family", "task", "kind", "pooling"), SET_UPS)
def test_self_test_passes(
    make_config: Callable[..., RunConfig], family: str, task: str, kind: str, pooling: str
) -> None:
    source = make_config(family, task).model.source
    private = {"unit": "example", "noise_multiplier": 1.0}
    config = make_config(
        family, task, model={"source": source, "pooling": pooling}, adapter={"kind": kind}, privacy=private
    )
    self_test.cache_clear()
    assert self_test(resident_model(config), config) > 0


def step_of(net: Net) -> Tensor:
    """What a DP step with a clip that never bites subtracts from all parameters."""
    named = dict(net.named_parameters())
    before = torch.cat([p.detach().flatten().clone() for p in named.values()])
    optimizer = torch.optim.SGD(named.values(), lr=1.0)
    rule = mechanism_of(clip=1e4, noise=1e-14)
    with DpStep(net, named, optimizer, rule, CryptoStream(bytes(32)), batch_first=True) as step:
        step.micro_batch(net(IDS), len(IDS))
        step.apply(len(IDS))
    return before - torch.cat([p.detach().flatten() for p in named.values()])


class Normed(Net):
    """A net with a trained LayerNorm in the path."""

    def forward(self, ids: Tensor, repeats: int = 1) -> Tensor:
        return self.second(self.odd(self.table(ids))).square().mean(dim=(1, 2)) + self.first(self.table(ids)).mean(
            (1, 2)
        )


@pytest.mark.parametrize("entries", [11, LARGEST_EMBEDDING + 1])
def test_layers_that_opacus_knows_are_left_to_its_hooks(entries: int) -> None:
    net = Normed(odd=nn.LayerNorm(6), table=nn.Embedding(entries, 6))
    net(IDS).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    torch.testing.assert_close(step_of(net), expected, rtol=1e-4, atol=1e-6)


def test_layers_that_neither_knows_are_refused_by_name() -> None:
    for net in (Net(odd=nn.Bilinear(6, 6, 6)), Net(table=nn.Embedding(11, 6, max_norm=1.0))):
        with pytest.raises(PrivacyError, match="cannot be captured in"):
            step_of(net)
    tied = Net(table=nn.Embedding(LARGEST_EMBEDDING + 1, 6), second=nn.Linear(6, LARGEST_EMBEDDING + 1, bias=False))
    tied.second.weight = tied.table.weight
    with pytest.raises(PrivacyError, match="cannot be captured in"):
        step_of(tied)
