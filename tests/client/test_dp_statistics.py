"""Statistics of what real local training does: which noise is added where, and which records are in which step.

Error rates: where many p-values are looked at, the least of n is held against 1e-6 / n, so that a test fails by chance
once in a million; correlations are held against 6 standard errors (2e-9 each, at most 1e5 of them).
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from client.dp.sampling import poisson_batches
from client.dp.step import DpStep
from client.site import Site, virtual_site
from client.training.loop import train_locally
from common.config.run import RunConfig
from common.methods import trained_names
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism
from common.randomness import CryptoStream, PrivateRandomness, SystemRandomness
from tests.mechanisms import mechanism_of

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}
Draws = list[np.ndarray]


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_noise_of_every_clipping_has_its_deviation_over_a_million_draws(clipping: str) -> None:
    """Each of eight layers, at the standard deviation of the gradient's noise: z C / √(1 - shares), over q N."""
    model = torch.nn.Sequential(*(torch.nn.Linear(354, 354, bias=False) for _ in range(8)))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.zeros_(parameter)
    share = 0.2 if clipping == "adaptive" else 0.0
    rule = mechanism_of(clip=0.3, noise=1.7, expected=5.0, clipping=clipping, quantile_share=share)
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    with DpStep(model, parameters, optimizer, rule, CryptoStream(bytes(range(32))), batch_first=True) as step:
        step.apply(0)
    layers = [parameter.detach().double().flatten().numpy() for parameter in parameters.values()]
    draws, expected = np.concatenate(layers), 1.7 * 0.3 / 5.0 / (1 - share) ** 0.5
    assert len(draws) > 1_000_000
    assert draws.std() == pytest.approx(expected, rel=0.005)
    assert abs(draws.mean()) < 6 * expected / len(draws) ** 0.5
    assert stats.kstest(draws / expected, "norm").pvalue > 1e-6
    assert_uncorrelated(layers)


def assert_unrelated(draws: Draws) -> None:
    """Check that no number occurs twice in ``draws`` (float64) and that no two of them are correlated."""
    together = np.concatenate(draws)
    assert len(np.unique(together)) == len(together)
    assert_uncorrelated(draws)


def assert_uncorrelated(draws: Draws) -> None:
    size = min(map(len, draws))
    rows = np.stack([draw[:size] for draw in draws])
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), k=1)]
    assert np.abs(correlations).max() < 6 / size**0.5


def noise_of_training(
    config: RunConfig, rounds: Iterable[int], patch: pytest.MonkeyPatch, randomness: type[PrivateRandomness] | None
) -> Draws:
    """Train all three sites for some rounds and return the noise of every step, all parameters in one array."""
    recorded: Draws = []
    real = CryptoStream.normal

    def recording(self: CryptoStream, shape: Any) -> torch.Tensor:
        drawn = real(self, shape)
        recorded[-1] = np.append(recorded[-1], drawn.numpy().ravel())
        return drawn

    apply = DpStep.apply

    def starting(self: DpStep, rows: int) -> None:
        recorded.append(np.empty(0))
        apply(self, rows)

    patch.setattr(CryptoStream, "normal", recording)
    patch.setattr(DpStep, "apply", starting)
    for number, round_number in itertools.product(range(3), rounds):
        site = site_of(config, number)
        if randomness is not None:
            site = Site(site.name, site.rows, site.lengths, randomness())
        train(config, site, round_number)
    patch.undo()
    return recorded


def site_of(config: RunConfig, number: int) -> Site:
    return virtual_site(config, {"partition-id": number, "num-partitions": 3}, resident_model(config))


def train(config: RunConfig, site: Site, round_number: int) -> None:
    model = resident_model(config)
    start = initial_adapter(model, config.seed)
    mechanism = plan_mechanism(config, len(site.rows))
    assert mechanism is not None
    train_locally(model, site, config, start, trained_names(config, start), round_number, mechanism)


@pytest.mark.parametrize("randomness", [None, SystemRandomness], ids=["virtual", "real"])
def test_no_two_sites_rounds_or_steps_share_noise(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, randomness: type[SystemRandomness] | None
) -> None:
    config = make_config(
        privacy=PRIVATE, training={"local_steps": 4}, federation={"rounds": 3}, adapter={"target_modules": "all-linear"}
    )
    draws = noise_of_training(config, (1, 2, 3), monkeypatch, randomness)
    assert len(draws) == 3 * 3 * 4
    assert min(map(len, draws)) > 500
    assert_unrelated(draws)
    if randomness is not None:  # a restart: the same rounds once more
        assert_unrelated(draws + noise_of_training(config, (1, 2, 3), monkeypatch, randomness))


@pytest.mark.slow
def test_restarted_process_draws_other_noise() -> None:
    program = (
        "from common.randomness import SystemRandomness as S;"
        "import json; print(json.dumps([S().stream(p, 1).normal((64,)).tolist() for p in ('noise', 'sampling')]))"
    )
    command = [sys.executable, "-c", program]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    numbers = np.array([json.loads(text) for text in said])
    assert numbers.shape == (2, 2, 64)
    assert len(np.unique(numbers)) == numbers.size


def test_every_step_of_training_is_a_poisson_sample_and_adds_noise(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch sizes are binomial, empty ones too: Σ (b - q N)² / (q N (1 - q)) is about χ² with a degree a step."""
    steps, rate = 150, 0.15
    config = make_config(privacy=PRIVATE | {"sample_rate": rate}, training={"local_steps": steps, "lr": 1e-9})
    site, sizes, taken = site_of(config, 0), [0], [0]
    micro_batch, apply, normal = DpStep.micro_batch, DpStep.apply, CryptoStream.normal
    noises: list[int] = []

    def counting(self: DpStep, losses: torch.Tensor, *rest: Any) -> None:
        sizes[-1] += len(losses)
        micro_batch(self, losses, *rest)

    def ending(self: DpStep, rows: int) -> None:
        noises.append(0)
        apply(self, rows)
        sizes.append(0)
        taken[0] += 1

    def drawing(self: CryptoStream, shape: Any) -> torch.Tensor:
        noises[-1] += 1
        return normal(self, shape)

    monkeypatch.setattr(DpStep, "micro_batch", counting)
    monkeypatch.setattr(DpStep, "apply", ending)
    monkeypatch.setattr(CryptoStream, "normal", drawing)
    train(config, site, 1)
    monkeypatch.undo()
    counts, expected = np.array(sizes[:-1]), rate * len(site.rows)
    assert taken[0] == steps == len(counts)
    assert set(noises) == {noises[0]}
    assert noises[0] > 0
    assert stats.binomtest(int(counts.sum()), steps * len(site.rows), rate).pvalue > 1e-6
    assert stats.binomtest(int((counts == 0).sum()), steps, (1 - rate) ** len(site.rows)).pvalue > 1e-6
    spread = ((counts - expected) ** 2).sum() / (expected * (1 - rate))
    assert 1e-6 < stats.chi2.cdf(spread, steps) < 1 - 1e-6


def test_records_are_included_independently_of_each_other_and_of_the_step_before() -> None:
    count, steps, rate = 40, 4000, 0.2
    chosen = np.zeros((steps, count), dtype=bool)
    for row, batch in zip(chosen, poisson_batches(count, rate, steps, CryptoStream(bytes(range(32)))), strict=True):
        row[batch] = True
    pairs = list(itertools.combinations(range(count), 2))
    joint = [int((chosen[:, a] & chosen[:, b]).sum()) for a, b in pairs]
    assert min(stats.binomtest(hits, steps, rate**2).pvalue for hits in joint) > 1e-6 / len(pairs)
    repeated = [int((chosen[:-1:2, a] & chosen[1::2, a]).sum()) for a in range(count)]
    assert min(stats.binomtest(hits, steps // 2, rate**2).pvalue for hits in repeated) > 1e-6 / count
    sizes = chosen.sum(axis=1)
    assert 1e-6 < stats.chi2.cdf(((sizes - count * rate) ** 2).sum() / (count * rate * (1 - rate)), steps) < 1 - 1e-6
