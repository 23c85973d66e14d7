"""The benchmarks run for real on a tiny case; no figure is judged here."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from client.dp.step import DpStep
from common.config.run import RunConfig
from common.data.batches import Collator
from common.data.federated import load_federated_data
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.randomness import CryptoStream
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm
from simulations.benchmarks.dp import CASES, Case, case_config, dp_figures
from simulations.benchmarks.flower_ray import flower_seconds
from simulations.benchmarks.ghost import GhostStep
from simulations.benchmarks.harness import harness_figures
from simulations.benchmarks.idle import idle_round
from simulations.benchmarks.measure import Measurement, in_pairs, measurement
from simulations.benchmarks.memory import compare_memory
from simulations.benchmarks.side_by_side import side_by_side
from simulations.benchmarks.step_work import StepWork, with_overrides

TINY = Case("LoRA r=2 all-linear", "{rank: 2, alpha: 4, target_modules: all-linear}", 4, 8)


def expect_sound(figure: Measurement) -> None:
    assert figure.runs >= 1
    assert all(math.isfinite(value) and value > 0 for value in (figure.ratio, figure.ours, figure.baseline))
    assert set(figure.as_dict()) == {"name", "ratio", "ours", "baseline", "unit", "runs"}


def test_measurement_is_the_median_of_the_pairs_ratios() -> None:
    figure = measurement("x", [(1.0, 2.0), (3.0, 3.0), (8.0, 2.0)], "MiB")
    assert (figure.ratio, figure.ours, figure.baseline, figure.unit, figure.runs) == (1.0, 3.0, 2.0, "MiB", 3)


def test_pairs_alternate_which_side_is_first() -> None:
    calls: list[str] = []
    in_pairs("x", lambda: calls.append("a"), lambda: calls.append("b"), 2)
    assert "".join(calls) == "ab" + "ab" + "ba"


@pytest.mark.slow
def test_dp_figures_cover_every_way_time_and_memory(make_config: Callable[..., RunConfig]) -> None:
    figures = list(dp_figures(make_config(), (TINY,), pairs=1))
    for figure in figures:
        expect_sound(figure)
    names = " ".join(figure.name for figure in figures)
    for part in (
        "DP step / plain step",
        "hooks",
        "ghost",
        "noise",
        "self-test",
        "per_layer",
        "adaptive",
        "peak memory",
        "wall",
        "CPU",
    ):
        assert part in names
    assert len({figure.name for figure in figures}) == len(figures)
    assert {figure.unit for figure in figures} == {"s", "MiB"}


@pytest.mark.slow
def test_harness_and_plain_loop_end_on_the_same_adapter(make_config: Callable[..., RunConfig]) -> None:
    config = with_overrides(
        make_config(), ["evaluation.enabled=false", "data.test=null", "aggregation.weights=examples"]
    )
    figures, distance = harness_figures("tiny", config, 1)
    assert len(figures) == 2
    assert distance < 1e-4
    for figure in figures:
        expect_sound(figure)


@pytest.mark.slow
def test_runs_side_by_side_are_counted_apart(make_config: Callable[..., RunConfig]) -> None:
    config = with_overrides(make_config(), ["evaluation.enabled=false", "data.test=null", "federation.rounds=1"])
    longer = with_overrides(config, ["training.local_epochs=40"])
    ours, theirs = side_by_side([longer, config])
    assert ours.cpu > theirs.cpu > 0
    assert ours.wall > ours.cpu * 0.9


@pytest.mark.slow
def test_failing_memory_process_is_reported(make_config: Callable[..., RunConfig]) -> None:
    from common.errors import RunError

    config = case_config(make_config(), TINY)
    with pytest.raises(RunError, match="status 1"):
        compare_memory("x", with_overrides(config, ["model.source=/nowhere"]), 2, 4, 1)


def moved_by(step: DpStep | GhostStep, config: RunConfig, work: StepWork, before: Tensors) -> Tensors:
    model = resident_model(config)
    model.load(before)
    with step:
        work.run(step)
    return {name: before[name] - value for name, value in model.state().items()}


def test_ghost_clipping_gives_the_step_of_captured_gradients(make_config: Callable[..., RunConfig]) -> None:
    config = case_config(make_config(), TINY, "privacy.noise_multiplier=1.0e-9")
    model = resident_model(config)
    torch.manual_seed(1)
    before = {name: torch.randn_like(value) * 0.3 for name, value in model.state().items()}
    work = StepWork(config, TINY.rows, TINY.tokens)
    mechanism = plan_mechanism(config, 10 * TINY.rows)
    assert mechanism is not None
    sgd = torch.optim.SGD(model.parameters.values(), lr=1.0)
    ours = DpStep(model.module, model.parameters, sgd, mechanism, CryptoStream(bytes(32)), batch_first=True)
    captured = moved_by(ours, config, work, before)
    ghost = moved_by(GhostStep(model.module, sgd, mechanism), config, work, before)
    assert l2_norm(captured) > 0
    assert l2_norm({name: ghost[name] - captured[name] for name in captured}) < 1e-4 * l2_norm(captured)


def test_idle_round_brings_every_payload_back() -> None:
    found = idle_round(sites=7, size_bytes=1000, rounds=2)
    assert (found.sites, found.size_bytes) == (7, 1000)
    assert found.wall_s > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_flowers_simulation_does_the_same_steps_as_the_plain_loop(make_config: Callable[..., RunConfig]) -> None:
    config = with_overrides(make_config(), ["federation.rounds=1", "training.optimizer=sgd", "training.lr=1.0e-9"])
    done = flower_seconds(config, cached=False, workers=1)
    assert done.messages == 3
    assert 0 < done.first_round_s <= done.wall_s
    model = resident_model(config)
    model.load(initial_adapter(model, config.seed))
    losses = []
    for examples in load_federated_data(config.data, config.seed).train.values():
        rows = TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)
        batch = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)(rows)
        losses += (
            TASKS[config.data.task]
            .loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask), batch)
            .tolist()
        )
    assert done.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_cases_are_those_of_the_targets() -> None:
    assert [(case.rows, case.tokens) for case in CASES] == [(16, 64), (32, 128), (16, 64)]
