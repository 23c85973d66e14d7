"""The coordinator's processes killed in the middle of a run: it ends complete, with the bits of an undisturbed one.

A fault takes two to three minutes of real processes, so that two of them are tried unless FEDTUNE_FAULTS is "all".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config.load import dump_run_config, parse_run_config
from server.run_place import RunPlace
from server.state_folder import StateFolder
from server.supervise.service import component_states, running_service
from simulations.local_federation.commands import wait_for
from simulations.local_federation.federation import LocalFederation, coordinator_up, local_coordinator, virtual_nodes
from simulations.local_federation.rows import write_joint_rows, write_site_rows
from tests.conftest import config_text

SITES, ROUNDS = 2, 3

pytestmark = pytest.mark.slow


@dataclass
class Disturbed:
    """A federation whose processes are killed."""

    federation: LocalFederation
    config: Path
    again: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def state(self) -> StateFolder:
        return StateFolder(self.federation.state)

    def adapter(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.federation.export(run) / "adapter" / "adapter_model.safetensors")

    def submit(self, name: str) -> RunPlace:
        self.federation.submit(self.config, f"name={name}")
        return RunPlace(self.state, name)

    def kill_component(self, name: str) -> None:
        os.kill(component_states(self.state)[name]["pid"], signal.SIGKILL)

    def kill_serverapp(self, place: RunPlace) -> None:
        os.kill(json.loads((place.path / "lease.json").read_text())["pid"], signal.SIGKILL)

    def kill_everything(self, place: RunPlace) -> None:
        known = running_service(self.state)
        assert known is not None
        os.kill(known["service"]["pid"], signal.SIGKILL)
        for part in known["components"].values():
            os.kill(part["process"]["pid"], signal.SIGKILL)
        self.kill_serverapp(place)
        self.federation.coordinator.wait()
        self.federation.coordinator = self.again.enter_context(coordinator_up(self.federation.folder))


@pytest.fixture(scope="module")
def disturbed(tiny_models: dict[str, Path]) -> Iterator[Disturbed]:
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "source").mkdir()
        rounds = {"rounds": ROUNDS, "min_sites": SITES}
        text = config_text(folder / "source", tiny_models["bert"], federation=rounds, evaluation={"enabled": False})
        config = parse_run_config(text, "test", None)
        files = write_site_rows(config, SITES, folder)
        write_joint_rows(config, files, folder / "rows.jsonl")
        data = config.data.model_copy(update={"train": str(folder / "rows.jsonl"), "test": None})
        (folder / "run.yaml").write_text(dump_run_config(config.model_copy(update={"data": data})))
        with local_coordinator(folder, "local", lambda said: None) as federation, virtual_nodes(federation, files):
            made = Disturbed(federation, folder / "run.yaml")
            with made.again:
                yield made


@pytest.fixture(scope="module")
def undisturbed(disturbed: Disturbed) -> dict[str, torch.Tensor]:
    place = disturbed.submit("undisturbed")
    disturbed.federation.wait_until_over(place.name)
    assert place.submission().fence == 1
    return disturbed.adapter("undisturbed")


FAULTS: dict[str, Callable[[Disturbed, RunPlace], None]] = {
    "superlink": lambda made, place: made.kill_component("superlink"),
    "gateway": lambda made, place: made.kill_component("gateway"),
    "caretaker": lambda made, place: made.kill_component("caretaker"),
    "executor": lambda made, place: made.kill_component("executor"),
    "serverapp": lambda made, place: made.kill_serverapp(place),
    "everything": lambda made, place: made.kill_everything(place),
}
SURVIVED = {"superlink", "gateway", "caretaker"}
"""Faults after which the same ServerApp goes on."""


TRIED = tuple(FAULTS) if os.environ.get("FEDTUNE_FAULTS") == "all" else ("superlink", "executor")


@pytest.mark.parametrize("fault", TRIED)
def test_run_ends_complete_with_the_same_bits(
    disturbed: Disturbed, undisturbed: dict[str, torch.Tensor], fault: str
) -> None:
    place = disturbed.submit(f"killed-{fault}")
    wait_for(lambda: place.completed_rounds() >= 1, "the first round")
    FAULTS[fault](disturbed, place)
    line = disturbed.federation.wait_until_over(place.name)
    assert (line["submissions"] == 1) == (fault in SURVIVED)
    records = list(place.folder.iterate_records("round"))
    assert [record["round"] for record in records] == [1, 2, 3]
    assert all(site["status"] == "admitted" for record in records for site in record["sites"].values())
    adapter = disturbed.adapter(place.name)
    assert adapter.keys() == undisturbed.keys()
    assert all(torch.equal(adapter[name], undisturbed[name]) for name in undisturbed)
