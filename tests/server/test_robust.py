"""Robust rules against slow references on dense vectors, against Flower's, and against hostile sites in a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import compute_distances, select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.codecs.codec import decode, encode
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.factors import A, B, factors_of, layers_of, with_rank
from common.methods import METHODS
from common.tensors import Tensors, manifest_of
from server.aggregation import products, robust
from server.aggregation.robust import (
    change_products,
    coefficients,
    combine_by_entry,
    combine_by_site,
    expect_enough_sites,
    krum_scores,
)
from server.collected import Collected
from simulations.engines.settings import EngineSettings
from simulations.run import simulate
from tests.server.factor_rounds import HEAD, FactorRound, random_round

RULES = ["norm_clip", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum"]
SCALE = 2.0
LINEAR = sorted(name for name, method in METHODS.items() if method.linear and name != "fedsa_lora")
GATHERING = sorted(name for name, method in METHODS.items() if not method.linear)


def changes(current: FactorRound) -> Tensor:
    """Each site's change to the model as one dense float64 vector: [n, d]."""
    rows = []
    for site in current.updates:
        local, parts = current.local(site), []
        for layer in layers_of(current.adapter):
            after = factors_of(local, layer)
            before = factors_of(with_rank(current.adapter, after.rank), layer)
            parts.append(SCALE * (after.b @ after.a - before.b @ before.a).flatten())
        rows.append(torch.cat([*parts, current.updates[site][HEAD].double().flatten()]))
    return torch.stack(rows)


def combined(rule: str, bad: int, current: FactorRound) -> Tensors:
    if rule in robust.BY_ENTRY:
        return combine_by_entry(rule, bad, current.updates)
    shares = coefficients(rule, bad, current.adapter, current.updates, current.weights, SCALE)
    return combine_by_site(current.updates, shares)


@pytest.mark.parametrize("method", LINEAR)
def test_inner_products_are_those_of_the_dense_changes(method: str) -> None:
    current = random_round(method, 9, 7, [2] * 5, 3)
    dense = changes(current)
    torch.testing.assert_close(change_products(current.adapter, list(current.updates.values()), SCALE), dense @ dense.T)


@pytest.mark.parametrize("method", [name for name in GATHERING if METHODS[name].mixed_ranks])
def test_inner_products_of_sites_with_ranks_of_their_own_are_those_of_the_dense_changes(method: str) -> None:
    current = random_round(method, 9, 7, [2, 4, 1, 4, 3], 3)
    dense = changes(current)
    torch.testing.assert_close(change_products(current.adapter, list(current.updates.values()), SCALE), dense @ dense.T)


def test_inner_products_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    current = random_round("flexlora", 9, 7, [2, 4, 1, 4, 3], 3)
    whole = change_products(current.adapter, list(current.updates.values()), SCALE)
    for size in (1, 3, 7):
        monkeypatch.setattr(products, "_BLOCK", size)
        torch.testing.assert_close(change_products(current.adapter, list(current.updates.values()), SCALE), whole)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(7)), seed=st.integers(0, 1000))
def test_order_of_sites_does_not_change_a_bit(rule: str, order: list[int], seed: int) -> None:
    current = random_round("fedit", 5, 6, [2] * 7, seed)
    sites = list(current.updates)
    shuffled = FactorRound(current.adapter, {sites[i]: current.updates[sites[i]] for i in order}, current.weights)
    first, second = combined(rule, 1, current), combined(rule, 1, shuffled)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", LINEAR)
def test_equal_updates_give_that_update(rule: str, method: str) -> None:
    current = random_round(method, 5, 6, [2] * 5, 1)
    same = FactorRound(current.adapter, dict.fromkeys(current.updates, current.updates["site 0"]), current.weights)
    for name, value in combined(rule, 1, same).items():
        torch.testing.assert_close(value, current.updates["site 0"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [1000.0, -1000.0])
def test_two_of_seven_sites_cannot_move_the_aggregate_far(rule: str, factor: float) -> None:
    torch.manual_seed(0)
    current = random_round("ffa_lora", 6, 5, [2] * 7, 2)
    base = current.updates["site 0"]
    updates = {s: {n: v + 0.1 * torch.randn_like(v) for n, v in base.items()} for s in current.updates}
    hostile = updates | {s: {n: factor * v for n, v in updates[s].items()} for s in ("site 2", "site 5")}
    even = dict.fromkeys(updates, 1.0)
    size = sum(float(v.square().sum()) for v in base.values()) ** 0.5

    def distance(found: Tensors) -> float:
        return sum(float((found[n] - base[n]).square().sum()) for n in base) ** 0.5 / size

    got = distance(combined(rule, 2, FactorRound(current.adapter, hostile, even)))
    plain = distance({n: torch.stack([u[n] for u in hostile.values()]).mean(dim=0) for n in base})
    assert plain > 100
    assert got < (0.7 if rule == "norm_clip" else 0.2)


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        pair for pair in itertools.product(GATHERING, ["krum", "multi_krum", "geometric_median"])
        if pair != ("hetlora", "geometric_median")
    ],
)  # fmt: skip
def test_method_that_needs_all_factors_takes_a_rules_weights(
    make_config: Callable[..., RunConfig], method: str, rule: str
) -> None:
    current = random_round(method, 6, 5, [2] * 7, 2)
    hostile = {n: -100.0 * v for n, v in current.updates["site 2"].items()}
    spoilt = FactorRound(current.adapter, current.updates | {"site 2": hostile}, current.weights)
    config = make_config(aggregation={"method": method, "robust": rule}, adapter={"rank": 2, "alpha": 2 * SCALE})
    collected = Collected(1, spoilt.adapter, config, None, {})
    for site in reversed(spoilt.updates):
        collected.add(site, 2, spoilt.updates[site], spoilt.weights[site])
    found = collected.aggregated(1)

    shares = coefficients(rule, 1, spoilt.adapter, spoilt.updates, spoilt.weights, SCALE)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["site 2"] < (1e-3 if rule == "geometric_median" else 1e-12)
    kept = {site: update for site, update in spoilt.updates.items() if shares[site] > 0}
    assert len(kept) == {"krum": 1, "multi_krum": 6, "geometric_median": 7}[rule]
    wanted = FactorRound(spoilt.adapter, kept, shares).aggregate(method)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("method", "hidden"),
    [
        *itertools.product(["fedit", "hetlora", "fedex_lora", "lora_fair"], ["B zero", "A / s and s B", "A alone"]),
        ("fedsa_lora", "A alone"),
    ],
)
@pytest.mark.parametrize("rule", ["norm_clip", "krum", "multi_krum", "geometric_median"])
def test_site_cannot_hide_in_factors_whose_product_is_as_before(method: str, rule: str, hidden: str) -> None:
    current = random_round(method, 6, 5, [2] * 7, 2)
    adapter = dict(current.adapter)
    if hidden == "B zero" or method == "fedsa_lora":
        adapter = {name: torch.zeros_like(value) if name.endswith(B) else value for name, value in adapter.items()}
    torch.manual_seed(0)
    honest = current.updates["site 0"]
    updates = {
        site: {name: 0.1 * (value + 0.1 * torch.randn_like(value)) for name, value in honest.items()}
        for site in current.updates
    }
    moved = {name: torch.zeros_like(value) for name, value in honest.items()} | {HEAD: updates["site 2"][HEAD]}
    for name in honest:
        if name.endswith(A):
            moved[name] = (1e-3 - 1.0) * adapter[name] if hidden == "A / s and s B" else 1e3 * adapter[name]
        if name.endswith(B) and hidden == "A / s and s B":
            moved[name] = 999.0 * adapter[name]
    spoilt = updates | {"site 2": moved}
    if hidden != "A alone":
        change = changes(FactorRound(adapter, {"site 2": moved}, current.weights))[0]
        assert float(change[: -moved[HEAD].numel()].norm()) < 1e-3  # nothing is to be seen in the product
    shares = coefficients(rule, 2, adapter, spoilt, dict.fromkeys(spoilt, 1.0), SCALE)
    assert shares["site 2"] < 0.02
    assert min(share for site, share in shares.items() if site != "site 2") > 0.05 or rule in ("krum", "multi_krum")


def test_krum_is_flowers_where_that_is_exact_enough() -> None:
    current = random_round("ffa_lora", 6, 5, [2] * 9, 4)
    dense = changes(current)
    contents = [RecordDict({"a": ArrayRecord({"w": Array(row.numpy())})}) for row in dense]
    records = [content.array_records["a"] for content in contents]
    gram = dense @ dense.T
    ours = torch.diagonal(gram).unsqueeze(0) + torch.diagonal(gram).unsqueeze(1) - 2 * gram
    np.testing.assert_allclose(compute_distances(records), ours.numpy(), atol=1e-9)
    for bad in (0, 1, 2, 3):
        (theirs,) = select_multikrum(contents, bad, 1)
        assert contents[int(krum_scores(gram, bad).argmin())] is theirs
        several = select_multikrum(contents, bad, len(dense) - bad)
        kept = robust.RULES["multi_krum"](gram, torch.ones(len(dense), dtype=torch.float64) / len(dense), bad) > 0
        assert {id(contents[int(index)]) for index in kept.nonzero()} == set(map(id, several))


def test_median_and_trimmed_mean_are_numpys_and_flowers_by_entry() -> None:
    current = random_round("ffa_lora", 6, 5, [2] * 6, 5)
    name = "one" + B
    rows = np.sort(np.stack([update[name].double().numpy() for update in current.updates.values()]), axis=0)
    np.testing.assert_allclose(combined("median", 1, current)[name], np.median(rows, axis=0), rtol=1e-6)
    trimmed = combined("trimmed_mean", 2, current)[name]
    np.testing.assert_allclose(trimmed, rows[2:-2].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(trimmed, trim_mean(rows, 2.5 / len(rows)), rtol=1e-5)  # Flower's


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    current = random_round("ffa_lora", 6, 5, [2] * 5, 6)
    dense, even = changes(current), dict.fromkeys(current.updates, 1.0)
    found = combined("geometric_median", 1, FactorRound(current.adapter, current.updates, even))
    alone = FactorRound(current.adapter, {"site": found}, {"site": 1.0})
    at = changes(alone)[0]
    best = float((dense - at).norm(dim=1).sum())
    torch.manual_seed(0)
    for step in (1e-1, 1e-2):
        for _ in range(20):
            assert float((dense - at - step * torch.randn_like(at)).norm(dim=1).sum()) > best


@pytest.mark.parametrize(("rule", "least"), [("median", 5), ("krum", 7), ("multi_krum", 7), ("trimmed_mean", 5)])
def test_breakdown_condition_is_checked(rule: str, least: int) -> None:
    expect_enough_sites(rule, 2, least, "a round")
    with pytest.raises(RunError, match=f"a round has {least - 1} sites .* needs {least}"):
        expect_enough_sites(rule, 2, least - 1, "a round")


def test_rule_that_the_sites_cannot_carry_ends_before_the_first_round(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"a round has 3 sites but aggregation\.robust 'krum'"):
        simulate(make_config(aggregation={"robust": "krum"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        ({"aggregation": {"method": "flora", "robust": "median"}}, "takes the place of a weighted mean"),
        ({"aggregation": {"robust": "median"}, "privacy": {"unit": "site"}}, "under site-level privacy"),
    ],
)
def test_rule_is_refused_where_it_makes_no_sense(
    make_config: Callable[..., RunConfig], sections: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_config(**sections)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "rolora", "fedsvd"])
def test_hostile_site_spoils_a_run_without_a_rule_and_not_with_one(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    import client.answers

    real = client.answers.answer_train

    def scaling(header: bytes, payload: bytes, site: Any, *rest: Any) -> Any:
        reply, update = real(header, payload, site, *rest)
        if site.name != "site 1":
            return reply, update
        from safetensors.torch import load

        sent = load(update)
        return reply, encode({n: -300.0 * v for n, v in decode(update, manifest_of(sent), "fp32").items()}, "fp32")

    def loss(name: str, **keys: Any) -> float:
        config = make_config(aggregation={"method": method, **keys}, federation={"rounds": 2})
        summary = simulate(config, tmp_path / name, engine=EngineSettings(cohort=1))
        return float(summary["metrics_after"]["test"]["overall"]["loss"])

    honest = loss("honest")
    monkeypatch.setattr(client.answers, "answer_train", scaling)
    assert abs(loss("median", robust="median") - honest) < 0.3 < loss("spoilt") - honest
