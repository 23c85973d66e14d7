"""The DP step against slow, obvious references."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from client.dp.sampling import poisson_batches, shuffled_batches
from client.dp.step import DpStep
from common.config.run import RunConfig
from common.data.batches import Batch, Collator, TokenRow
from common.data.federated import load_federated_data
from common.errors import PrivacyError
from common.models.adapter import AdaptedModel
from common.models.resident import resident_model
from common.privacy.planning import Mechanism
from common.randomness import CryptoStream
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm
from tests.mechanisms import mechanism_of

FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2"]


def mechanism(clip: float = 1e6, noise: float = 1e-12, expected: float = 1.0) -> Mechanism:
    return mechanism_of(clip, noise, expected)


def rows_of(config: RunConfig, model: AdaptedModel) -> list[TokenRow]:
    examples = load_federated_data(config.data, config.seed).train["site 0"]
    return TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)


def collate(model: AdaptedModel, rows: list[TokenRow]) -> Batch:
    return Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)(rows)


def losses(model: AdaptedModel, config: RunConfig, rows: list[TokenRow]) -> torch.Tensor:
    batch = collate(model, rows)
    return TASKS[config.data.task].loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask), batch)


def random_adapter(model: AdaptedModel) -> None:
    torch.manual_seed(1)
    model.load({name: torch.randn_like(value) * 0.3 for name, value in model.state().items()})


def gradient_one_by_one(model: AdaptedModel, config: RunConfig, rows: list[TokenRow], clip: float) -> Tensors:
    """The clipped sum by definition: one record, one backward pass, one clip at a time."""
    parameters = model.train_only(frozenset(model.parameters))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        for p in parameters.values():
            p.grad = None
        losses(model, config, [row]).sum().backward()
        own = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        factor = min(1.0, clip / (l2_norm(own) + 1e-6))
        for name, value in own.items():
            total[name] += factor * value
    return total


def gradient_by_step(
    model: AdaptedModel, config: RunConfig, batches: list[list[TokenRow]], rule: Mechanism, *, capture: bool = True
) -> Tensors:
    """What the step gives to an SGD of rate 1 that starts at zero: minus the gradient."""
    before = model.state()
    parameters = model.train_only(frozenset(model.parameters))
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    model.module.train()
    noise = CryptoStream(bytes(32))
    with DpStep(
        model.module, parameters, optimizer, rule, noise, batch_first=True, capture="layers" if capture else "hooks"
    ) as step:
        for batch in batches:
            step.micro_batch(losses(model, config, batch), 0)
        step.apply(0)
    after = model.state()
    model.load(before)
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "hooks"])
@pytest.mark.parametrize("clip", [1e6, 0.05])
@pytest.mark.parametrize(
    ("family", "task"),
    [*((family, "classification") for family in FAMILIES), ("llama", "causal_lm"), ("gpt2", "causal_lm")],
)
def test_step_is_the_sum_of_clipped_one_by_one_gradients(
    make_config: Callable[..., RunConfig], family: str, task: str, clip: float, capture: bool
) -> None:
    config = make_config(family, task, adapter={"target_modules": "all-linear"})
    model = resident_model(config)
    random_adapter(model)
    rows = rows_of(config, model)[:7]
    slow = gradient_one_by_one(model, config, rows, clip)
    for batches in ([rows], [rows[:3], rows[3:6], rows[6:]]):
        fast = gradient_by_step(model, config, batches, mechanism(clip), capture=capture)
        error = l2_norm({name: fast[name] - slow[name] for name in slow}) / l2_norm(slow)
        assert error < 1e-5


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "hooks"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_step_is_exact_with_gradient_checkpointing(
    make_config: Callable[..., RunConfig], family: str, capture: bool
) -> None:
    config = make_config(family, model={"gradient_checkpointing": True})
    model = resident_model(config)
    random_adapter(model)
    rows = rows_of(config, model)[:4]
    slow = gradient_one_by_one(model, config, rows, 0.05)
    fast = gradient_by_step(model, config, [rows], mechanism(0.05), capture=capture)
    assert l2_norm({name: fast[name] - slow[name] for name in slow}) < 1e-5 * l2_norm(slow)


def test_sum_is_divided_by_the_expected_not_the_actual_batch(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    model = resident_model(config)
    random_adapter(model)
    rows = rows_of(config, model)[:3]
    whole = gradient_by_step(model, config, [rows], mechanism(0.05, expected=1.0))
    tenth = gradient_by_step(model, config, [rows], mechanism(0.05, expected=10.0))
    for name, value in whole.items():
        torch.testing.assert_close(tenth[name], value / 10, atol=1e-7, rtol=1e-3)


def test_empty_batch_steps_on_noise_of_the_right_size(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"rank": 64, "target_modules": "all-linear"})
    model = resident_model(config)
    random_adapter(model)
    moved = gradient_by_step(model, config, [], mechanism(clip=0.5, noise=3.0, expected=2.0))
    draws = torch.cat([value.flatten() for value in moved.values()]).double().numpy()
    assert len(draws) > 10_000
    assert stats.kstest(draws / (3.0 * 0.5 / 2.0), "norm").pvalue > 1e-6


def test_noise_over_a_million_draws_has_its_deviation() -> None:
    layer = torch.nn.Linear(1000, 1000, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rule = mechanism(clip=0.1, noise=1.3, expected=4.0)
    noise = CryptoStream(bytes(32))
    with DpStep(layer, {"weight": layer.weight}, optimizer, rule, noise, batch_first=True) as step:
        step.apply(0)
    draws = layer.weight.detach().double().flatten().numpy()
    assert draws.std() == pytest.approx(1.3 * 0.1 / 4.0, rel=0.005)
    assert stats.kstest(draws / (1.3 * 0.1 / 4.0), "norm").pvalue > 1e-6


def test_time_major_family_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("xlnet")
    model = resident_model(config)
    optimizer = torch.optim.SGD(model.parameters.values(), lr=1.0)
    family = model.base.family
    with pytest.raises(PrivacyError, match="time before batch"):
        DpStep(model.module, model.parameters, optimizer, mechanism(), CryptoStream(bytes(32)), family.batch_first)


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "hooks"])
def test_model_is_as_before_after_the_round(make_config: Callable[..., RunConfig], capture: bool) -> None:
    config = make_config()
    model = resident_model(config)
    gradient_by_step(model, config, [rows_of(config, model)[:2]], mechanism(), capture=capture)
    assert not any("forward" in module.__dict__ for module in model.module.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.module.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.module.modules())
    assert not hasattr(model.module, "autograd_grad_sample_hooks")


def test_poisson_sampling_includes_each_record_at_the_accounted_rate() -> None:
    steps, rate = 4000, 0.1
    counts = torch.zeros(50)
    sizes = []
    for batch in poisson_batches(50, rate, steps, CryptoStream(bytes(32))):
        counts[batch] += 1
        sizes.append(len(batch))
    pvalues = [stats.binomtest(int(count), steps, rate).pvalue for count in counts]
    assert min(pvalues) > 1e-6 / 50
    assert 0 in {len(b) for b in poisson_batches(5, 0.1, 200, CryptoStream(bytes(32)))}
    assert torch.tensor(sizes).double().std() == pytest.approx(math.sqrt(50 * rate * (1 - rate)), rel=0.1)


def test_shuffled_batches_pass_over_every_record() -> None:
    batches = list(shuffled_batches(10, 4, 6, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for batch in half for i in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
