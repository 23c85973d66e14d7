from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import ref

import pytest

from common.config.run import RunConfig
from common.models.adapter import AdaptedModel, adapt
from common.models.base import choose_device, load_base
from common.models.weak_cache import weak_cache

Make = Callable[[], AdaptedModel]


@pytest.fixture
def make_model(make_config: Callable[..., RunConfig]) -> Make:
    config, device = make_config(), choose_device("cpu")
    return lambda: adapt(load_base(config.model, config.data, device), config.adapter, config.data, device)


def test_result_is_kept_by_model_and_values_up_to_the_size(make_model: Make) -> None:
    asked: list[tuple[AdaptedModel, int]] = []

    @weak_cache(2)
    def count(model: AdaptedModel, number: int) -> int:
        """Counts."""
        asked.append((model, number))
        return len(asked)

    one, other = make_model(), make_model()
    assert [count(one, 7), count(one, 7), count(one, 8), count(one, 7)] == [1, 1, 2, 1]
    assert count(other, 7) == 3
    assert count(one, 8) == 4  # pushed out
    count.cache_clear()
    assert count(one, 8) == 5
    assert asked == [(one, 7), (one, 8), (other, 7), (one, 8), (one, 8)]
    assert count.__doc__ == "Counts."


def test_model_is_let_go_and_another_in_its_place_gets_nothing_of_it(make_model: Make) -> None:
    asked = []

    @weak_cache(8)
    def count(model: AdaptedModel) -> int:
        asked.append(model.base.fingerprint)
        return len(asked)

    for number in range(1, 4):
        model = make_model()
        assert count(model) == count(model) == number
        gone, base = ref(model), ref(model.base)
        del model
        gc.collect()
        assert gone() is None
        assert base() is None


def test_failure_is_not_kept(make_model: Make) -> None:
    asked = []

    @weak_cache(2)
    def fail(model: AdaptedModel) -> None:
        asked.append(1)
        raise ValueError("once more")

    model = make_model()
    for _ in range(2):
        with pytest.raises(ValueError, match="once more"):
            fail(model)
    assert len(asked) == 2
