"""Simulated seconds, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import client.training.loop
from client.training.site_round import SiteRound
from common.config.run import RunConfig
from common.config.simulation import ProfileConfig
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from simulations.faults.clock import SimulatedClock, SiteSeconds, jitter_factor, site_seconds
from simulations.faults.work import TokensDone

SITES = ("site 0", "site 1", "site 2")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({}, (0.0, 0.0, 0.0)),
        ({"tokens_per_s": 100.0}, (20.0, 0.0, 0.0)),
        ({"tokens_per_s": 100.0, "speed": 0.5}, (40.0, 0.0, 0.0)),
        ({"step_s": 2.0, "speed": 4.0}, (1.5, 0.0, 0.0)),
        ({"up_mbit_s": 4.0}, (0.0, 2.0, 0.0)),
        ({"down_mbit_s": 8.0, "latency_s": 0.25}, (0.0, 0.25, 2.25)),
        ({"step_s": 1.0, "up_mbit_s": 1.0, "down_mbit_s": 16.0, "latency_s": 0.5}, (3.0, 8.5, 1.5)),
    ],
)
def test_seconds_of_a_site_by_hand(profile: dict[str, Any], expected: tuple[float, float, float]) -> None:
    """2 MB down, 1 MB up, 3 steps over 2,000 tokens."""
    known = ProfileConfig(name="x", share=1.0, **profile)
    found = site_seconds(known, bytes_down=2_000_000, bytes_up=1_000_000, steps=3, tokens=2000)
    assert (found.compute, found.up, found.down) == pytest.approx(expected)
    assert found.total == pytest.approx(sum(expected))
    doubled = site_seconds(known, 2_000_000, 1_000_000, 3, 2000, factor=2.0)
    assert doubled.total == pytest.approx(2 * sum(expected))


def test_site_without_a_profile_takes_no_time() -> None:
    assert site_seconds(None, 10**9, 10**9, 10**6, 10**6) == SiteSeconds(0.0, 0.0, 0.0)


def test_jitter_has_median_one_and_the_deviation_asked_for() -> None:
    logs = [math.log(jitter_factor(0.5, 0, number, "a")) / 0.5 for number in range(4000)]
    assert abs(sum(logs) / 4000) <= 4.42 / math.sqrt(4000)  # error rate 1e-5
    assert abs(sum(value**2 for value in logs) / 4000 - 1) <= 4.42 * math.sqrt(2 / 4000)
    assert jitter_factor(0.0, 0, 1, "a") == 1.0


def test_clock_jumps_to_the_next_arrival_or_to_the_deadline() -> None:
    clock = SimulatedClock(arrivals={"a": 3.0, "b": 7.0, "never": math.inf})
    stops = []
    for _ in range(4):
        clock.wait(10.0)
        stops.append(clock.now())
    assert stops == [3.0, 7.0, 10.0, 10.0]
    clock.wait(math.inf)
    assert clock.now() == 10.0


@pytest.mark.parametrize(
    "privacy",
    [{"unit": "none"}, {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}],
    ids=["no DP", "DP"],
)
def test_tokens_are_those_that_the_site_trained_on(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    config = make_config(privacy=privacy, training={"local_epochs": 1.5})
    model = resident_model(config)
    start = initial_adapter(model, config.seed)
    trained_on = 0
    real = client.training.loop._run_batch

    def counting(model: Any, own: SiteRound, config: Any, batch: list[int], step: Any) -> None:
        nonlocal trained_on
        trained_on += sum(len(own.site.rows[index]) for index in batch)
        real(model, own, config, batch, step)

    monkeypatch.setattr(client.training.loop, "_run_batch", counting)
    site = client.site.virtual_site(config, {"partition-id": 1, "num-partitions": 3}, model)
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    result = client.training.loop.train_locally(model, site, config, start, frozenset(start), 2, mechanism)
    assert trained_on > 0
    assert TokensDone(config, model, SITES)("site 1", 2, result.steps) == trained_on
