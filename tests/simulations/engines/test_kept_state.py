"""What sites keep between rounds is in one file of one machine: workers are told where, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import simulations.run
from client.personal import STATE, what_sites_keep
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from simulations.engines.catalog import ENGINES, open_engine
from simulations.engines.settings import EngineSettings
from simulations.run import simulate

KEPT: dict[str, dict[str, Any]] = {
    "aggregation.method 'fedsa_lora'": {"aggregation": {"method": "fedsa_lora"}},
    "training.control_variates": {"training": {"optimizer": "sgd", "control_variates": True}},
    "communication.top_k 0.1": {"communication": {"top_k": 0.1}},
}


@pytest.mark.parametrize("key", KEPT)
def test_cluster_that_exists_is_refused_to_runs_that_keep_state_at_sites(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setitem(ENGINES, "ray", lambda *_: pytest.fail("an engine was made, which looks for the cluster"))
    config = make_config(**KEPT[key])
    assert what_sites_keep(config) == key
    settings = EngineSettings("ray", 1, address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=rf"--address is given and {key} has sites keep state.*Leave --address out"):
        simulate(config, tmp_path / "run", engine=settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"fedsa_lora"}))
def test_other_runs_keep_nothing(make_config: Callable[..., RunConfig], method: str) -> None:
    assert what_sites_keep(make_config(aggregation={"method": method})) is None


def test_head_alone_keeps_nothing(make_config: Callable[..., RunConfig]) -> None:
    assert what_sites_keep(make_config(adapter={"kind": "head_only"})) is None


def test_workers_are_told_a_path_that_holds_in_any_folder(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def opened(
        settings: EngineSettings, config: RunConfig, nodes: int, device: str, node: Mapping[str, str], rows: list[int]
    ) -> object:
        told.append(node[STATE])
        return open_engine(settings, config, nodes, device, node, rows)

    monkeypatch.setattr(simulations.run, "open_engine", opened)
    monkeypatch.chdir(tmp_path)
    simulate(make_config(aggregation={"method": "fedsa_lora"}, federation={"rounds": 1}), Path("runs/x"))
    assert told == [str(tmp_path / "runs" / "x" / "sites.db")]
    assert Path(told[0]).is_file()
