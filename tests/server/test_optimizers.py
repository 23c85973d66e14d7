"""Server optimizers against a plain loop over one number, and through the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config.federation import AggregationConfig
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from common.run_folder import RunFolder
from common.tensors import Tensors
from server.aggregation.optimizers import SECOND_MOMENTS, optimized
from server.checkpoint import load_checkpoint
from server.events import Observer
from simulations.run import simulate

NAMES = sorted(SECOND_MOMENTS)


def by_hand(name: str, updates: list[float], lr: float, beta1: float, beta2: float, tau: float) -> list[float]:
    """Steps on one number, as the paper's Algorithm 2 has them."""
    m, v, steps = 0.0, tau**2, []
    for delta in updates:
        if name == "fedavgm":
            m = beta1 * m + delta
            steps.append(lr * m)
            continue
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedadam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            assume(abs(v - delta**2) > 1e-4 * v)  # at equality it jumps, and float32 falls on either side
            v = v - (1 - beta2) * delta**2 * (1 if v > delta**2 else -1 if v < delta**2 else 0)
        steps.append(lr * m / (v**0.5 + tau))
    return steps


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(
    updates=st.lists(st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=6),
    beta1=st.sampled_from([0.0, 0.5, 0.9]), beta2=st.sampled_from([0.5, 0.99]), tau=st.sampled_from([1e-3, 0.1]),
)  # fmt: skip
def test_steps_are_those_of_the_algorithm(
    name: str, updates: list[float], beta1: float, beta2: float, tau: float
) -> None:
    rates = AggregationConfig(
        server_optimizer=name, server_lr=0.3, server_beta1=beta1, server_beta2=beta2, server_tau=tau  # type: ignore[arg-type]
    )  # fmt: skip
    moments: Tensors = {}
    got = []
    for delta in updates:
        step, moments = optimized({"x": torch.tensor([delta, 0.0])}, moments, rates)
        got.append(float(step["x"][0]))
        assert step["x"][1] == 0
    assert got == pytest.approx(by_hand(name, updates, 0.3, beta1, beta2, tau), rel=1e-4, abs=1e-6)


def test_momentum_without_memory_at_rate_one_is_plain_averaging(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    plain = simulate(make_config(), tmp_path / "plain")
    same = make_config(aggregation={"server_optimizer": "fedavgm", "server_beta1": 0.0})
    assert simulate(same, tmp_path / "same")["metrics_after"] == plain["metrics_after"]


class StopInRound2(Observer):
    """Presses Ctrl-C when the second round begins."""

    def round_started(self, number: int, cohort: object) -> None:
        if number == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["fedavgm", "fedyogi"])
def test_moments_survive_a_resume_to_the_bit(make_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    config = make_config(aggregation={"server_optimizer": name, "server_lr": 0.1}, federation={"rounds": 3})
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopInRound2())
    assert simulate(config, tmp_path / "cut", resume=True)["metrics_after"] == whole["metrics_after"]
    first, second = (load_checkpoint(RunFolder(tmp_path / part).checkpoint) for part in ("whole", "cut"))
    assert first.moments
    assert first.moments.keys() == second.moments.keys()
    for one, two in ((first.moments, second.moments), (first.adapter, second.adapter)):
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_optimizer_is_refused_where_coordinates_change_from_round_to_round(
    make_config: Callable[..., RunConfig], method: str
) -> None:
    asked = {"method": method, "server_optimizer": "fedadam"}
    if METHODS[method].optimizable:
        make_config(aggregation=asked)
        return
    with pytest.raises(ConfigError, match="same coordinates every round"):
        make_config(aggregation=asked)
