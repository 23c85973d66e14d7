from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.federation import AggregationConfig
from common.errors import AdmissionError
from common.methods import METHODS
from common.tensors import Tensors
from server.aggregation.catalog import AGGREGATORS, aggregator_of
from server.aggregation.exact_sum import FRACTION_BITS, REST_BITS, ExactSum

LINEAR = sorted(method for method in AGGREGATORS if METHODS[method].linear)


def random_update(seed: int, size: float = 0.1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * size for name, shape in (("a", (3, 4)), ("b", (5,)))}


def aggregate(method: str, updates: list[Tensors], weights: list[float], adapter: Tensors) -> Tensors:
    aggregator = aggregator_of(AggregationConfig(method=method))
    state = aggregator.init(adapter)
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        state = aggregator.update(state, f"site {number}", update, weight)
    return aggregator.finish(state.mean(), adapter)


@pytest.mark.parametrize("method", LINEAR)
def test_average_equals_the_dense_weighted_mean(method: str) -> None:
    updates, weights, adapter = [random_update(i) for i in range(5)], [0.2, 1.0, 0.5, 0.3, 0.9], random_update(9)
    got = aggregate(method, updates, weights, adapter)
    for name, start in adapter.items():
        mean = sum(w * u[name].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
        torch.testing.assert_close(got[name], (start + mean).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", LINEAR)
def test_single_site_gives_its_own_adapter(method: str) -> None:
    adapter, update = random_update(1), random_update(2)
    got = aggregate(method, [update], [0.37], adapter)
    for name, start in adapter.items():
        torch.testing.assert_close(got[name], start + update[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", LINEAR)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_stream_has_the_bits_of_the_batch(method: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    updates = [random_update(i, 10.0 ** data.draw(st.integers(-6, 3))) for i in range(count)]
    weights = [data.draw(st.floats(1e-3, 1.0)) for _ in range(count)]
    adapter = random_update(42)
    streamed = aggregate(method, updates, weights, adapter)
    shares = np.array(weights)
    for name, start in adapter.items():
        batch = np.stack([update[name].double().numpy() for update in updates])
        terms = batch * shares.reshape(-1, *[1] * start.dim()) * 2.0**FRACTION_BITS
        whole = np.rint(terms)
        rest = np.rint((terms - whole) * 2.0**REST_BITS).astype(np.int64).sum(axis=0) / 2.0**REST_BITS
        total = whole.astype(np.int64).sum(axis=0) + rest
        mean = total / (2.0**FRACTION_BITS * float(sum(map(Fraction, weights))))
        assert torch.equal(streamed[name], start + torch.from_numpy(np.asarray(mean)).float())


@settings(deadline=None)
@given(order=st.permutations(range(6)), data=st.data())
def test_order_of_sites_does_not_change_a_bit(order: list[int], data: st.DataObject) -> None:
    updates = [random_update(i, 10.0 ** data.draw(st.integers(-6, 3))) for i in range(6)]
    weights = [data.draw(st.floats(1e-9, 1.0)) for _ in range(6)]
    adapter = random_update(42)
    first = aggregate("fedit", updates, weights, adapter)
    shuffled = aggregate("fedit", [updates[i] for i in order], [weights[i] for i in order], adapter)
    assert all(torch.equal(first[name], shuffled[name]) for name in first)


def test_zero_updates_change_nothing() -> None:
    adapter = random_update(1)
    zero = {name: torch.zeros_like(value) for name, value in adapter.items()}
    assert all(torch.equal(aggregate("fedit", [zero, zero], [1, 1], adapter)[n], adapter[n]) for n in adapter)


def test_values_out_of_range_are_refused_before_anything_is_added() -> None:
    total = ExactSum.zero(random_update(0))
    total.add(random_update(1), 1.0)
    before = {name: value.clone() for name, value in total.totals.items()}
    with pytest.raises(AdmissionError, match="range"):
        total.add({**random_update(2), "b": torch.full((5,), 1e9)}, 1.0)
    assert all(torch.equal(before[name], total.totals[name]) for name in before)
    assert total.count == 1


@settings(deadline=None)
@given(declared=st.lists(st.integers(1, 50), min_size=1, max_size=6), size=st.sampled_from([1.0, 1e-3, 1e-6]))
def test_a_billion_rows_that_never_count_cost_the_others_no_digits(declared: list[int], size: float) -> None:
    updates = [random_update(i, size) for i in range(len(declared))]
    total = ExactSum.zero(updates[0])
    for update, rows in zip(updates, declared, strict=True):
        total.add(update, rows / 1e9)
    for name, mean in total.mean().items():
        rows = torch.tensor(declared, dtype=torch.float64)
        wanted = torch.einsum("k,k...->...", rows / rows.sum(), torch.stack([u[name].double() for u in updates]))
        assert float((mean - wanted).abs().max()) <= 1e-6 * size


def test_sum_never_overflows_silently() -> None:
    total = ExactSum.zero({"a": torch.zeros(1)})
    for _ in range(67):
        total.add({"a": torch.full((1,), 1e6)}, 1.0)
    with pytest.raises(AdmissionError, match="range"):
        total.add({"a": torch.full((1,), 1e6)}, 1.0)
    assert total.mean()["a"].item() == 1e6
