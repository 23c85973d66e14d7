from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.data.tokens import load_federated_tokens
from simulations.cache import token_cache_folder
from simulations.cli import app

pytest.importorskip("matplotlib")

from simulations.partition_picture import MOST_BUBBLES, draw_partition, partition_of

Make = Callable[..., RunConfig]
PNG = b"\x89PNG"


def test_counts_are_those_of_the_rows(make_config: Make) -> None:
    config = make_config(data={"partition": {"kind": "dirichlet", "sites": 3, "alpha": 2.0}})
    data = load_federated_data(config.data, config.seed)
    tokens = load_federated_tokens(config.data, config.seed, Path(config.model.source), None)
    partition = partition_of(config, tokens)
    for place, site in enumerate(partition.sites):
        labels = [row.label for row in data.train[site]]
        assert partition.train[place].tolist() == [labels.count(label) for label in range(3)]
        assert partition.test[place] == len(data.test.get(site, ()))
    sizes = partition.train.sum(axis=1)
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("sites", [1, 3, MOST_BUBBLES + 20])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_any_number_of_sites_can_be_drawn(make_config: Make, tmp_path: Path, sites: int, task: str) -> None:
    family = "bert" if task == "classification" else "gpt2"
    config = make_config(family, task, data={"partition": {"kind": "iid", "sites": sites}})
    for part in (config.data.train, str(config.data.test)):
        Path(part).write_text(Path(part).read_text() * 6)
    load_federated_tokens.cache_clear()
    tokens = load_federated_tokens(config.data, config.seed, Path(config.model.source), None)
    draw_partition(tmp_path / "p.png", config, tokens)
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_check_and_run_draw_it(make_config: Make, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_run_config(make_config()))
    runner = CliRunner()
    done = runner.invoke(app, ["check", str(config), "--picture", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    done = runner.invoke(app, ["run", str(config), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "partition.png").read_bytes().startswith(PNG)
    assert re.search(r"partition\.png", done.output)


def test_cache_folder_can_be_moved_and_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    assert token_cache_folder() == tmp_path
    monkeypatch.setenv("FEDTUNE_CACHE", "")
    assert token_cache_folder() is None
    monkeypatch.delenv("FEDTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_cache_folder() == tmp_path / "fedtune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert token_cache_folder() == Path.home() / ".cache" / "fedtune"
