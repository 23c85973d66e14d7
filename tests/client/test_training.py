from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from client.site import Site, virtual_site
from client.training.loop import train_locally
from client.training.optimizers import lr_factor
from client.training.site_round import LocalResult
from common.config.run import RunConfig
from common.config.training import TrainingConfig
from common.data.batches import Collator
from common.errors import ConfigError
from common.methods import trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import Mechanism, plan_mechanism
from common.randomness import SystemRandomness, torch_generator
from common.tensors import Tensors, l2_norm
from tests.mechanisms import mechanism_of


def site_of(config: RunConfig, model: AdaptedModel, number: int = 0) -> Site:
    return virtual_site(config, {"partition-id": number, "num-partitions": 3}, model)


def train(config: RunConfig, round_number: int = 1, mechanism: Mechanism | None = None) -> LocalResult:
    model = resident_model(config)
    start = initial_adapter(model, config.seed)
    names = trained_names(config, start)
    return train_locally(model, site_of(config, model), config, start, names, round_number, mechanism)


def distance(first: Tensors, second: Tensors) -> float:
    return l2_norm({name: first[name] - second[name] for name in first}) / l2_norm(first)


def test_micro_batches_give_the_update_of_whole_batches(make_config: Callable[..., RunConfig]) -> None:
    cut, whole = (train(make_config(training={"micro_batch_size": size})) for size in (1, 64))
    assert distance(whole.update, cut.update) < 1e-3
    assert cut.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


def test_local_steps_equal_a_plain_loop(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"optimizer": "sgd", "lr": 0.1, "local_steps": 5})
    result = train(config)
    model = resident_model(config)
    site = site_of(config, model)
    start = initial_adapter(model, config.seed)
    model.load(start)
    parameters = model.train_only(frozenset(start))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    order = torch.randperm(12, generator=torch_generator(config.seed, "order", 1, site.name)).tolist()
    collate = Collator(model.base.tokenizer.pad_token_id)
    model.module.train()
    again = torch_generator(config.seed, "order", 1, site.name)
    torch.randperm(12, generator=again)
    second = torch.randperm(12, generator=again).tolist()
    for indices in (order[:4], order[4:8], order[8:], second[:4], second[4:8]):
        batch = collate([site.rows[index] for index in indices])
        logits = model.logits(batch.input_ids, batch.attention_mask)
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: p.detach() - start[name] for name, p in parameters.items()}
    assert result.steps == 5
    assert distance(expected, result.update) < 1e-4


def test_huge_clip_and_hardly_any_noise_is_plain_sgd_on_the_same_batches(make_config: Callable[..., RunConfig]) -> None:
    training = {"optimizer": "sgd", "lr": 0.1, "local_steps": 4, "batch_size": 12}
    private = make_config(training=training, privacy={"unit": "example", "noise_multiplier": 1e-9, "clip_norm": 1e4})
    plain = make_config(training=training)
    mechanism = mechanism_of(noise=1e-9, clip=1e4, expected=12.0, steps=4)
    assert distance(train(plain).update, train(private, mechanism=mechanism).update) < 1e-3


def test_training_repeats_to_the_bit_and_differs_by_round_and_site(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"dropout": 0.3})
    first, again, later = train(config), train(config), train(config, round_number=2)
    assert all(torch.equal(first.update[name], again.update[name]) for name in first.update)
    assert distance(first.update, later.update) > 1e-3


def test_training_leaves_the_global_generator_alone(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(adapter={"dropout": 0.3})
    resident_model(config)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    train(config)
    assert torch.equal(torch.rand(1), expected)


def test_frozen_parts_do_not_move_and_trained_ones_do(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"method": "ffa_lora"})
    model = resident_model(config)
    frozen = {name: p.clone() for name, p in model.module.named_parameters() if ".default." not in name}
    result = train(config)
    assert not any(".lora_A." in name for name in result.update)
    assert {name for name, value in result.update.items() if not value.any()} == set()
    for name, parameter in model.module.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    start = initial_adapter(model, config.seed)
    state = model.state()
    assert all(torch.equal(state[name], start[name]) for name in start if ".lora_A." in name)


def test_loss_is_withheld_under_dp_and_given_without(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "example", "noise_multiplier": 1.0})
    mechanism = plan_mechanism(config, 12)
    assert train(config, mechanism=mechanism).train_loss is None
    assert train(make_config()).train_loss is not None


def test_virtual_noise_is_keyed_by_site_and_round_and_real_noise_is_not(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    model = resident_model(config)
    draws = set()
    for number in range(3):
        for round_number in (1, 2):
            for purpose in ("noise", "sampling"):
                stream = site_of(config, model, number).randomness.stream(purpose, round_number)
                draws.add(float(stream.uniform(1)))
    assert len(draws) == 12
    system = SystemRandomness()
    assert len({float(system.stream("noise", 1).uniform(1)) for _ in range(50)}) == 50


@pytest.mark.parametrize(
    "node", [{}, {"partition-id": 0, "num-partitions": 2}, {"partition-id": 3, "num-partitions": 3}]
)
def test_node_that_is_no_virtual_site_is_refused(make_config: Callable[..., RunConfig], node: dict[str, int]) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match="expected"):
        virtual_site(config, node, resident_model(config))


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_follows_its_course(schedule: str, middle: float) -> None:
    training = TrainingConfig(schedule=schedule, warmup=0.2)  # type: ignore[arg-type]
    assert lr_factor(training, 0.0) == 0.0
    assert lr_factor(training, 0.1) == pytest.approx(0.5)
    assert lr_factor(training, 0.2) == pytest.approx(1.0)
    assert lr_factor(training, 0.6) == pytest.approx(middle)
    assert math.isclose(lr_factor(TrainingConfig(), 0.7), 1.0)


def test_gradient_norm_clip_bounds_a_plain_step(make_config: Callable[..., RunConfig]) -> None:
    training = {"optimizer": "sgd", "lr": 1.0, "local_steps": 1}
    free, clipped = (
        train(make_config(training=training)),
        train(make_config(training={**training, "max_grad_norm": 0.01})),
    )
    assert l2_norm(free.update) > 0.02
    assert l2_norm(clipped.update) == pytest.approx(0.01, rel=1e-3)
