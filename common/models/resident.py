"""The one base model of a process: loaded once, shared by every virtual site and by evaluation."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from common.config.run import RunConfig
from common.methods import method_of
from common.models.adapter import AdaptedModel, adapt
from common.models.base import choose_device, load_base


@dataclass
class _Resident:
    """The model that is held, what it was loaded for, and how often one was."""

    key: object = None
    model: AdaptedModel | None = None
    loads: int = 0


_resident = _Resident()


def resident_model(config: RunConfig, device: str = "auto", rank: int | None = None) -> AdaptedModel:
    """Return the adapted model of ``config``, loading it if this process has not yet.

    One is held at a time: that of another config goes before this one is loaded, so that memory never has to hold two
    bases, unless somebody else holds on to it.

    Whoever takes it loads the adapter it wants first: nothing is assumed about the values it was left with.

    Args:
        config: the run config.
        device: to compute on.
        rank: that factors are made with, where the device holds fewer than the run's; the run's if not given.
    """
    data, core = config.data, method_of(config).core
    key = (config.model, config.adapter, data, device, core, rank or config.adapter.rank)
    if _resident.model is not None and _resident.key == key:
        return _resident.model
    clear()
    gc.collect()  # modules refer to each other in circles: without this the old weights stay until Python cares to look
    _resident.loads += 1
    chosen = choose_device(device)
    model = adapt(load_base(config.model, data, chosen), config.adapter, data, chosen, core=core, rank=rank)
    _resident.key, _resident.model = key, model
    return model


def loads() -> int:
    """Return how often this process has set about loading a base model in its life."""
    return _resident.loads


def clear() -> None:
    """Forget the resident model, so that the next call loads it anew; :func:`loads` counts on."""
    _resident.key, _resident.model = None, None
