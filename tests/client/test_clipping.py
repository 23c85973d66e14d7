"""Clipping by example, by layer, by person and at a quantile, against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.dp.clipping import (
    MovingClip,
    ReleasedLoss,
    clip_factors,
    joint_norm,
    layer_groups,
    unit_norms,
    weighted_sum,
)
from client.dp.persons import PersonSums
from client.dp.step import DpStep
from common.errors import PrivacyError
from common.randomness import CryptoStream
from tests.mechanisms import mechanism_of

KEY = bytes(32)


def gradients_of(units: int, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(units, *shape, generator=draw) for shape in ((3, 4), (5,), (1, 2, 2))]


@settings(max_examples=50, deadline=None)
@given(
    units=st.integers(0, 6),
    seed=st.integers(0, 99),
    bound=st.floats(1e-4, 1e4),
    scale=st.sampled_from([0, 1e-6, 1, 1e6]),
)
def test_clipped_gradients_are_the_slow_ones_and_within_the_bound(
    units: int, seed: int, bound: float, scale: float
) -> None:
    gradients = gradients_of(units, seed, scale)
    factors = clip_factors(joint_norm(unit_norms(gradients)), bound)
    for unit in range(units):
        own = torch.cat([gradient[unit].flatten() for gradient in gradients]).double()
        norm = float(own.norm())
        assert float(factors[unit]) == pytest.approx(1.0 if norm <= bound else bound / norm, rel=1e-6)
        alone = [weighted_sum(gradient[unit : unit + 1], factors[unit : unit + 1]) for gradient in gradients]
        assert math.sqrt(sum(float(part.square().sum()) for part in alone)) <= bound * (1 + 1e-6)
    for gradient in gradients:
        slow = sum((factors[u] * gradient[u].double() for u in range(units)), torch.zeros(gradient.shape[1:]).double())
        torch.testing.assert_close(weighted_sum(gradient, factors), slow)


@pytest.mark.parametrize("scale", [3e-24, 1e-20, 1e-3, 1e15])
def test_small_and_many_entries_are_clipped_as_exactly(scale: float) -> None:
    gradient = scale * torch.ones(2, 1_000_000)
    bound = 1e-3 * scale
    factors = clip_factors(joint_norm(unit_norms([gradient])), bound)
    for unit in range(2):
        assert float((factors[unit] * gradient[unit].double()).norm()) == pytest.approx(bound, rel=1e-9)


def test_factors_and_parameters_of_a_layer_are_one_group() -> None:
    names = ["q.lora_A.weight", "q.lora_B.weight", "v.lora_B.weight", "classifier.bias", "classifier.weight"]
    assert layer_groups(names) == [[0, 1], [2], [3, 4]]


def linear_step(
    rows: torch.Tensor, unit: str = "example", persons: list[int] | None = None, cut: int = 99, **rule: object
) -> torch.Tensor:
    """What a DP step subtracts from the two layers of a model whose loss is their summed output: both, flat."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2, bias=False), "b": torch.nn.Linear(3, 1, bias=False)})
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=1.0)
    step = DpStep(model, named, optimizer, mechanism_of(unit=unit, **rule), CryptoStream(KEY), batch_first=True)  # type: ignore[arg-type]
    with step:
        for start in range(0, len(rows), cut):
            part = rows[start : start + cut]
            losses = model["a"](part).sum(dim=1) + 5.0 * model["b"](part).sum(dim=1)
            step.micro_batch(losses, len(rows), None if persons is None else persons[start : start + cut])
        step.apply(len(rows))
    return -torch.cat([parameter.detach().flatten() for parameter in named.values()]).double()


ROWS = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))


def test_layers_are_clipped_apart_each_to_its_share() -> None:
    for row in ROWS:
        moved = linear_step(row[None], clip=0.1, clipping="per_layer")
        shares = [float(moved[:6].norm()), float(moved[6:].norm())]
        assert shares == pytest.approx([0.1 / math.sqrt(2)] * 2, rel=1e-6)
    flat = linear_step(ROWS[:1], clip=0.1)
    assert float(flat[6:].norm()) > 3 * float(flat[:6].norm())


@pytest.mark.parametrize("cut", [1, 2, 4, 99])
def test_rows_of_a_person_are_clipped_together_however_they_are_cut(cut: int) -> None:
    persons = [4, 4, 4, 0, 7, 7, 2, 2, 2]
    slow = torch.zeros(9, dtype=torch.float64)
    for person in dict.fromkeys(persons):
        own = sum(linear_step(ROWS[i : i + 1], clip=1e3) for i, whose in enumerate(persons) if whose == person)
        assert isinstance(own, torch.Tensor)
        slow += own * min(1.0, 2.0 / float(own.norm()))
    torch.testing.assert_close(linear_step(ROWS, "user", persons, cut, clip=2.0), slow, rtol=1e-5, atol=1e-6)


def test_one_more_person_with_many_rows_moves_the_sum_by_at_most_the_clip() -> None:
    persons = [0, 0, 1, 2, 2]
    for clip in (0.01, 1.0):
        without = linear_step(ROWS[:5], "user", persons, 2, clip=clip)
        with_one = linear_step(ROWS, "user", [*persons, 3, 3, 3, 3], 2, clip=clip)
        assert float((with_one - without).norm()) <= clip * (1 + 1e-5)


def test_rows_without_persons_are_refused_under_unit_user() -> None:
    with pytest.raises(PrivacyError, match="persons"):
        linear_step(ROWS, "user", None)


def test_persons_fold_their_mean_loss() -> None:
    sums = PersonSums()
    first, losses = sums.fold([torch.ones(3, 2)], torch.tensor([1.0, 3.0, 9.0]), [5, 5, 6])
    assert (len(first[0]), losses.tolist()) == (1, [2.0])
    second, losses = sums.fold([torch.ones(1, 2)], torch.tensor([1.0]), [6])
    assert (len(second[0]), losses.tolist()) == (0, [])
    held = sums.flush()
    assert held is not None
    assert held[0][0].tolist() == [[2.0, 2.0]]
    assert held[1].tolist() == [5.0]
    assert sums.flush() is None


def test_answers_to_one_sample_cost_what_is_accounted() -> None:
    rule = mechanism_of(noise=1.3, clipping="adaptive", quantile_share=0.07, loss_share=0.11)
    inverse = sum(noise**-2 for noise in (rule.gradient_noise, rule.quantile_noise, rule.loss_noise))
    assert inverse == pytest.approx(1.3**-2)
    assert mechanism_of(noise=1.3).gradient_noise == 1.3


def test_adaptive_clip_norm_finds_the_quantile() -> None:
    rule = mechanism_of(clip=100.0, clipping="adaptive", quantile_share=0.05, expected=200.0)
    clip = MovingClip(rule, quantile=0.7, lr=0.2)
    norms = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    for _ in range(200):
        clip.observe(norms)
        clip.move(CryptoStream(KEY))
    assert float((norms <= clip.value).double().mean()) == pytest.approx(0.7, abs=0.02)


def test_one_unit_moves_the_count_by_half_and_its_noise_is_as_accounted() -> None:
    rule = mechanism_of(noise=2.0, clipping="adaptive", quantile_share=0.04, expected=1.0)
    stream = CryptoStream(KEY)
    logs = []
    for _ in range(4000):
        clip = MovingClip(rule, quantile=0.5, lr=1e-3)
        clip.observe(torch.tensor([0.5]).double())
        clip.move(stream)
        logs.append(-math.log(clip.value) / 1e-3)
    draws = torch.tensor(logs).double()
    assert stats.kstest(((draws - 0.5) / (0.5 * 2.0 / 0.2)).numpy(), "norm").pvalue > 1e-6


def test_clip_norm_stays_in_its_range() -> None:
    rule = mechanism_of(noise=1e4, clipping="adaptive", quantile_share=0.05, expected=1e-3)
    clip = MovingClip(rule, quantile=0.5, lr=1.0)
    for number in range(50):
        clip.move(CryptoStream(bytes([number] * 32)))
        assert 1e-8 <= clip.value <= 1e8


def test_flat_clip_norm_does_not_move() -> None:
    clip = MovingClip(mechanism_of(clip=0.3), quantile=0.5, lr=0.2)
    clip.observe(torch.ones(5).double())
    clip.move(CryptoStream(KEY))
    assert clip.value == 0.3


def test_released_loss_is_cut_noised_and_withheld_by_default() -> None:
    assert ReleasedLoss(mechanism_of(), bound=4.0).value() is None
    quiet = ReleasedLoss(mechanism_of(loss_share=0.1, expected=4.0), bound=2.0)
    quiet.observe(torch.tensor([0.5, 90.0, math.nan, -3.0]))
    quiet.end_step(CryptoStream(KEY))
    assert quiet.value() == pytest.approx((0.5 + 2.0 + 2.0 + 0.0) / 4.0)
    noisy = ReleasedLoss(mechanism_of(noise=3.0, loss_share=0.25, expected=1.0), bound=2.0)
    stream, draws = CryptoStream(KEY), []
    for _ in range(4000):
        before = noisy._sum
        noisy.end_step(stream)
        draws.append((noisy._sum - before) / (6.0 * 2.0))
    assert stats.kstest(draws, "norm").pvalue > 1e-6
