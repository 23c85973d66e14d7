"""Every aggregation method against the dense computation on random factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import server.aggregation.products
from common.factors import FIXED_A, FIXED_B, A, B, factors_of, layers_of, with_rank
from common.methods import METHODS
from common.tensors import Tensors
from server.aggregation.catalog import AGGREGATORS
from server.aggregation.products import measure
from tests.server.factor_rounds import HEAD, FactorRound, dense, dense_total, random_round, relative_error, shapes

EXACT = ["ffa_lora", "rolora", "flora", "fedex_lora", "fedsvd", "fed_sb"]
"""Methods whose next product is Σ w BA: those of mixed ranks at any, the others at one."""
CORRECTING = ["flora", "fedex_lora"]
BOTH_FACTORS = sorted(METHODS.keys() - {"fedsa_lora"})


def test_every_method_has_both_sides() -> None:
    assert AGGREGATORS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", EXACT)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_exact_method_equals_the_dense_weighted_mean_of_products(method: str, data: st.DataObject) -> None:
    m, n, ranks, seed = data.draw(shapes(METHODS[method].mixed_ranks))
    current = random_round(method, m, n, ranks, seed, with_correction=method in CORRECTING and data.draw(st.booleans()))
    after = current.aggregate(method)
    for layer in layers_of(current.adapter):
        off = float((dense_total(after, layer) - current.dense_target(layer)).norm())
        assert off < 1e-5 * current.dense_scale(layer)


@settings(deadline=None, max_examples=40)
@given(drawn=shapes(mixed=True))
def test_flexlora_is_the_best_approximation_of_its_rank(drawn: tuple[int, int, list[int], int]) -> None:
    m, n, ranks, seed = drawn
    current = random_round("flexlora", m, n, ranks, seed)
    after = current.aggregate("flexlora")
    for layer in layers_of(current.adapter):
        target = current.dense_target(layer)
        lost = torch.linalg.svdvals(target)[max(ranks) :].norm()
        assert float((dense(after, layer) - target).norm()) == pytest.approx(
            float(lost), abs=1e-5 * target.norm().item()
        )
        for rank in set(ranks):
            u, s, vt = torch.linalg.svd(target, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            cut = after[layer + B][:, :rank].double() @ after[layer + A][:rank].double()
            error = float((cut - target).norm() - (best - target).norm())
            assert error < 1e-5 * float(target.norm())


@settings(deadline=None, max_examples=40)
@given(drawn=shapes(mixed=False))
def test_lora_fair_is_the_ridge_solution_between_fedit_and_the_best_b(drawn: tuple[int, int, list[int], int]) -> None:
    m, n, ranks, seed = drawn
    current = random_round("lora_fair", m, n, ranks, seed)
    fair, plain = current.aggregate("lora_fair"), current.aggregate("fedit")
    for layer in layers_of(current.adapter):
        target, mean = current.dense_target(layer), factors_of(plain, layer)
        stacked_a = torch.cat([mean.a, 0.1 * torch.eye(len(mean.a), dtype=torch.float64)], dim=1)
        stacked_y = torch.cat([target - mean.b @ mean.a, torch.zeros(m, len(mean.a), dtype=torch.float64)], dim=1)
        wanted = mean.b + torch.linalg.lstsq(stacked_a.T, stacked_y.T).solution.T
        assert relative_error(factors_of(fair, layer).b, wanted) < 1e-4
        assert (dense(fair, layer) - target).norm() <= (dense(plain, layer) - target).norm() * (1 + 1e-5)


@settings(deadline=None, max_examples=40)
@given(drawn=shapes(mixed=True))
def test_hetlora_weighs_padded_factors_by_the_norm_of_their_product(drawn: tuple[int, int, list[int], int]) -> None:
    m, n, ranks, seed = drawn
    current = random_round("hetlora", m, n, ranks, seed)
    after = current.aggregate("hetlora")
    for layer in layers_of(current.adapter):
        shares, wanted = [], torch.zeros(max(ranks), n, dtype=torch.float64)
        for site, weight in current.weights.items():
            shares.append(weight * float(dense(current.local(site), layer).norm()))
        for site, share in zip(current.weights, shares, strict=True):
            own = current.local(site)[layer + A].double()
            wanted[: len(own)] += share / sum(shares) * own
        assert relative_error(after[layer + A].double(), wanted) < 1e-5


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.mixed_ranks])
def test_sites_of_low_rank_leave_the_others_something_to_train(method: str) -> None:
    whole = random_round(method, 9, 7, [1, 2, 4], 5)
    sites = list(whole.updates)[:2]
    low = FactorRound(whole.adapter, {s: whole.updates[s] for s in sites}, {s: whole.weights[s] for s in sites})
    after = {**whole.adapter, **low.aggregate(method)}
    for layer in layers_of(after):
        assert float(after[layer + A].norm(dim=1).min()) > 0.1  # else neither factor of a row ever had a gradient
        assert METHODS[method].fresh or float(after[layer + B][:, 3:].norm()) < 1e-5


@pytest.mark.parametrize("method", BOTH_FACTORS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_one_site_gives_its_own_adapter(method: str, data: st.DataObject) -> None:
    m, n, ranks, seed = data.draw(shapes(mixed=False))
    current = random_round(method, m, n, ranks[:1], seed)
    after = current.aggregate(method)
    for layer in layers_of(current.adapter):
        assert relative_error(dense_total(after, layer), dense(current.local("site 0"), layer)) < 1e-5
    torch.testing.assert_close(after[HEAD], current.local("site 0")[HEAD], rtol=1e-5, atol=1e-6)
    assert method == "flora" or not any(name.endswith((FIXED_A, FIXED_B)) for name in after)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_order_of_sites_does_not_change_a_bit(method: str, data: st.DataObject) -> None:
    m, n, ranks, seed = data.draw(shapes(METHODS[method].mixed_ranks))
    current = random_round(method, m, n, ranks, seed)
    shuffled = current.aggregate(method, data.draw(st.permutations(list(current.updates))))
    for name, value in current.aggregate(method).items():
        assert torch.equal(value, shuffled[name])


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_names_of_sites_do_not_matter(method: str, data: st.DataObject) -> None:
    m, n, ranks, seed = data.draw(shapes(METHODS[method].mixed_ranks))
    current = random_round(method, m, n, ranks, seed)
    names = dict(zip(current.updates, data.draw(st.permutations(list(current.updates))), strict=True))
    renamed = FactorRound(
        current.adapter,
        {names[site]: update for site, update in current.updates.items()},
        {names[site]: weight for site, weight in current.weights.items()},
    )
    before, after = current.aggregate(method), renamed.aggregate(method)
    for layer in layers_of(current.adapter):
        off = float((dense_total(after, layer) - dense_total(before, layer)).norm())
        assert off < 1e-5 * current.dense_scale(layer)
    torch.testing.assert_close(after[HEAD], before[HEAD], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_head_is_the_plain_weighted_mean_in_every_method(method: str) -> None:
    current = random_round(method, 7, 5, [2, 2, 2], 4)
    total = sum(current.weights.values())
    wanted = sum(w / total * current.local(site)[HEAD].double() for site, w in current.weights.items())
    torch.testing.assert_close(current.aggregate(method)[HEAD], wanted.float(), rtol=1e-5, atol=1e-6)


def test_correction_stays_factored_and_within_its_largest_rank() -> None:
    current = random_round("flora", 40, 30, [4] * 12, 1)
    for _ in range(3):
        after = current.aggregate("flora")
        current = FactorRound(
            {**after, **{k: v for k, v in current.adapter.items() if ".lora_" in k}}, current.updates, current.weights
        )
    assert after["one" + FIXED_A].shape == (30, 30)
    assert after["one" + FIXED_B].shape == (40, 30)


def test_fedsvd_keeps_a_orthonormal_also_where_nothing_was_learnt() -> None:
    current = random_round("fedsvd", 12, 9, [3, 3], 2)
    still = FactorRound(
        {**current.adapter, "one" + B: torch.zeros(12, 3)},
        {
            site: {name: torch.zeros_like(value) for name, value in sent.items()}
            for site, sent in current.updates.items()
        },
        current.weights,
    )
    for one in (current, still):
        a = one.aggregate("fedsvd")["one" + A]
        torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("paired", "rows"), [(32, 11), (3, 11), (3, 60)])
@pytest.mark.parametrize(
    ("method", "ranks"),
    [(method, [2] * 5) for method in BOTH_FACTORS]
    + [(method, [1, 2, 3, 1, 2]) for method in BOTH_FACTORS if METHODS[method].mixed_ranks],
)
def test_measures_equal_the_dense_ones(
    method: str, ranks: list[int], paired: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.aggregation.products, "MOST_PAIRED", paired)
    current = random_round(method, rows, 9 if rows < 20 else 70, ranks, 3)
    after = current.aggregate(method)
    local = {site: current.local(site) for site in current.updates}
    measured = measure(current.adapter, after, local, current.weights)
    assert measured is not None
    layers, total = layers_of(current.adapter), sum(current.weights.values())
    flat = {site: torch.cat([dense(own, layer).flatten() for layer in layers]) for site, own in local.items()}
    start = {
        rank: torch.cat([dense(with_rank(current.adapter, rank), layer).flatten() for layer in layers])
        for rank in set(ranks)
    }
    made = torch.cat([dense_total(after, layer).flatten() for layer in layers])
    mean = sum((w / total * flat[site] for site, w in current.weights.items()), torch.zeros_like(made))
    assert measured.error == pytest.approx(float((made - mean).norm() / mean.norm()), rel=1e-5, abs=1e-6)
    drift = sum(w / total * float((flat[site] - mean).square().sum()) for site, w in current.weights.items()) ** 0.5
    assert measured.drift == pytest.approx(drift, rel=1e-6)
    steps = {site: value - start[rank] for (site, value), rank in zip(flat.items(), ranks, strict=True)}
    assert measured.update_norms == pytest.approx({site: float(step.norm()) for site, step in steps.items()}, rel=1e-6)
    seen = [f"site {number}" for number in ((0, 1, 3) if paired == 3 else range(5))]
    pairs = [
        float(torch.cosine_similarity(steps[a], steps[b], dim=0)) for a in seen for b in seen if a < b
    ]  # fmt: skip
    assert measured.cosine_mean == pytest.approx(sum(pairs) / len(pairs), rel=1e-6, abs=1e-9)
    assert measured.cosine_min == pytest.approx(min(pairs), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("paired", [32, 3])
def test_measures_of_tensors_alone_are_those_of_one_long_vector(paired: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.aggregation.products, "MOST_PAIRED", paired)
    current = random_round("fedsa_lora", 6, 5, [2] * 5, 3)
    after, names = current.aggregate("fedsa_lora"), [*current.updates["site 0"]]
    after["one" + A] = after["one" + A] + 0.1
    local = {site: current.local(site) for site in current.updates}
    measured = measure(current.adapter, after, local, current.weights, names)
    assert measured is not None

    def flat(tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].double().flatten() for name in names])

    total, start = sum(current.weights.values()), flat(current.adapter)
    mean = sum((w / total * flat(local[site]) for site, w in current.weights.items()), torch.zeros_like(start))
    assert measured.error == pytest.approx(float((flat(after) - mean).norm() / mean.norm()), rel=1e-4)
    apart = {site: float((flat(own) - mean).square().sum()) for site, own in local.items()}
    assert measured.drift == pytest.approx(
        sum(w / total * apart[site] for site, w in current.weights.items()) ** 0.5, rel=1e-6
    )
    steps = {site: flat(own) - start for site, own in local.items()}
    assert measured.update_norms == pytest.approx({site: float(step.norm()) for site, step in steps.items()}, rel=1e-6)
    seen = [f"site {number}" for number in ((0, 1, 3) if paired == 3 else range(5))]
    assert measured.cosine_min == pytest.approx(
        min(float(torch.cosine_similarity(steps[a], steps[b], dim=0)) for a in seen for b in seen if a < b), rel=1e-6
    )


def test_measures_of_one_site_or_of_sites_that_learnt_nothing() -> None:
    current = random_round("ffa_lora", 6, 5, [2], 3)
    alone = measure(
        current.adapter, current.aggregate("ffa_lora"), {"site 0": current.local("site 0")}, {"site 0": 1.0}
    )
    assert alone is not None
    assert (alone.drift, alone.cosine_mean) == (0.0, None)
    zero = {**current.adapter, "one" + B: torch.zeros(6, 2), "two" + B: torch.zeros(6, 2)}
    nothing = measure(zero, zero, {"a": zero, "b": zero}, {"a": 1.0, "b": 1.0})
    assert nothing is not None
    assert (nothing.error, nothing.update_norms, nothing.cosine_min) == (None, {"a": 0.0, "b": 0.0}, None)
    assert measure({HEAD: zero[HEAD]}, {HEAD: zero[HEAD]}, {"a": zero}, {"a": 1.0}) is None
