"""A coordinator and three sites as real processes, from keys to ledgers, on a tiny model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from simulations.local_federation.__main__ import TOLERANCE, compare, federate, spent
from simulations.local_federation.rows import write_joint_rows, write_site_rows
from tests.conftest import config_text

PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5, "sample_rate": 0.5}
SITES = 3


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, as unix sockets need one."""
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        yield Path(name)


def config_in(folder: Path, model: Path, privacy: dict[str, Any]) -> RunConfig:
    source = folder / "source"
    source.mkdir()
    text = config_text(source, model, privacy=privacy, federation={"rounds": 2, "min_sites": SITES})
    return parse_run_config(text, "test", None)


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


@pytest.mark.slow
def test_three_real_sites_finish_a_private_run_with_a_ledger_each(folder: Path, tiny_models: dict[str, Path]) -> None:
    said: list[str] = []
    done = federate(config_in(folder, tiny_models["bert"], PRIVATE), SITES, folder, said.append)
    assert done["run"]["state"] == "completed"
    assert done["run"]["completed_rounds"] == 2
    assert len(done["ledgers"]) == SITES
    for report in done["ledgers"].values():
        assert 0 < spent(report) <= 8.1
        assert [run["rounds"] for run in report["runs"]] == [[1, 2]]
    assert load_file(done["exported"] / "adapter" / "adapter_model.safetensors")
    assert not left_over(folder)


@pytest.mark.slow
def test_deployment_trains_the_adapter_that_the_simulation_trains(folder: Path, tiny_models: dict[str, Path]) -> None:
    config = config_in(folder, tiny_models["bert"], {"unit": "none"})
    assert compare(config, SITES, folder, lambda said: None) <= TOLERANCE
    assert not left_over(folder)


def test_each_site_gets_its_own_rows_and_no_others(folder: Path, tiny_models: dict[str, Path]) -> None:
    config = config_in(folder, tiny_models["bert"], PRIVATE)
    files = write_site_rows(config, SITES, folder)
    rows = [path.read_text().splitlines() for path in files.values()]
    assert len({path.parent for path in files.values()}) == SITES
    assert sum(map(len, rows)) == 36
    assert all(set(one).isdisjoint(other) for n, one in enumerate(rows) for other in rows[n + 1 :])
    write_joint_rows(config, files, folder / "joint.jsonl")
    assert len((folder / "joint.jsonl").read_text().splitlines()) == 36


def test_more_sites_than_the_config_has_are_refused(folder: Path, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="at least 9"):
        write_site_rows(config_in(folder, tiny_models["bert"], PRIVATE), 9, folder)
