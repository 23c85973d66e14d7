"""The one base model of a process: loaded once, shared by every virtual site and by evaluation."""

from __future__ import annotations

from functools import lru_cache

from common.config.adapter import AdapterConfig
from common.config.data import DataConfig
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.methods import method_of
from common.models.adapter import AdaptedModel, adapt
from common.models.base import choose_device, load_base


def resident_model(config: RunConfig, device: str = "auto") -> AdaptedModel:
    """Return the adapted model of ``config``, loading it if this process has not yet.

    Whoever takes it loads the adapter it wants first: nothing is assumed about the values it was left with.
    """
    return _load(config.model, config.adapter, config.data, device, method_of(config).core)


@lru_cache(maxsize=1)
def _load(model: ModelConfig, adapter: AdapterConfig, data: DataConfig, device: str, core: bool) -> AdaptedModel:
    chosen = choose_device(device)
    return adapt(load_base(model, data, chosen), adapter, data, chosen, core=core)


def loads() -> int:
    """Return how often this process has loaded a base model since it last forgot it."""
    return _load.cache_info().misses


def clear() -> None:
    """Forget the resident model, so that the next call loads it anew; for benchmarks."""
    _load.cache_clear()
