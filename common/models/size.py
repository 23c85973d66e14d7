"""How many numbers an adapter has, counted before a weight is read or a factor is made."""

from __future__ import annotations

from functools import lru_cache

import torch

from common.config.adapter import AdapterConfig
from common.config.data import DataConfig
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.methods import method_of
from common.models.adapter import adapt
from common.models.base import load_base


def adapter_size(config: RunConfig) -> int:
    """Return the count of the adapter's numbers at the run's rank, from the shapes of the base model's layers.

    Raises:
        ModelError: for a base model or target modules that would not do.
    """
    return _size(config.model, config.adapter, config.data, method_of(config).core)


@lru_cache(maxsize=16)
def _size(model: ModelConfig, adapter: AdapterConfig, data: DataConfig, core: bool) -> int:
    nowhere = torch.device("meta")
    adapted = adapt(load_base(model, data, nowhere), adapter, data, nowhere, core=core)
    return sum(parameter.numel() for parameter in adapted.parameters.values())
