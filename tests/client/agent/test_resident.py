"""One base model in memory, whatever runs a coordinator sends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest

import common.models.resident
from common.config.run import RunConfig
from common.methods import received_names
from common.models.adapter import initial_adapter
from common.models.base import BaseModel, load_base
from common.models.resident import clear, loads, resident_model
from common.wire import SiteDescription, TrainReply
from tests.client.real_sites import PRIVATE, RealSite


class Bases:
    """Loads bases and sees which of them are still there; ``before`` has how many were when each was loaded."""

    def __init__(self) -> None:
        self._loaded: list[ref[BaseModel]] = []
        self.before: list[int] = []

    def load(self, *arguments: Any) -> BaseModel:
        self.before.append(self.alive())
        base = load_base(*arguments)
        self._loaded.append(ref(base))
        return base

    def alive(self) -> int:
        return sum(known() is not None for known in self._loaded)


def test_agent_holds_one_base_model_over_runs_of_different_adapters(
    make_site: Callable[..., RealSite], make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, runs = make_site(), []
    for adapter in ({"rank": 1}, {"rank": 2}, {"kind": "head_only"}, {"rank": 3}):
        config = make_config(privacy=PRIVATE, adapter=adapter)
        start = initial_adapter(resident_model(config, "cpu"), config.seed)
        runs.append((config, {name: start[name] for name in received_names(config, start, 1)}))
    bases, before = Bases(), loads()
    monkeypatch.setattr(common.models.resident, "load_base", bases.load)
    for number, (config, start) in enumerate([*runs, runs[0]], start=1):
        site.config = config
        assert isinstance(site.describe(), SiteDescription)
        assert isinstance(site.train(1, start, run=f"{number}" * 32)[0], TrainReply)
        gc.collect()
        assert bases.alive() == 1
        assert site.resident.status()["model_loads"] == loads() == before + number
    assert bases.before == [0] * 5


def test_loads_are_counted_over_the_life_of_the_process(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    clear()
    before = loads()
    model = resident_model(config, "cpu")
    assert resident_model(config, "cpu") is model
    assert loads() == before + 1
    clear()
    assert resident_model(config, "cpu") is not model
    assert loads() == before + 2
