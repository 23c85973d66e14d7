"""A federation in this process: the deployment's own coordinator and site code on a virtual grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import client.app
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import RunError
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.run_source import CONFIG_YAML
from server.events import Observer
from server.federation import RunSettings, run_federation
from simulations.check import expect_sound
from simulations.faults.around import with_faults
from simulations.grid import FIRST_NODE_ID, VirtualGrid, Watch

ENGINE = "inprocess"


def simulate(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    observer: Observer | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run ``config`` with one virtual node a site and return the summary.

    Args:
        config: the run config.
        folder: the run folder; new, or one with a checkpoint when resuming.
        resume: go on from the checkpoint.
        device: to compute on.
        observer: told what happens.
        watch: told what passes between coordinator and sites.

    Raises:
        FedtuneError: for whatever keeps it from running.
    """
    data = load_federated_data(config.data, config.seed)
    model = resident_model(config, device)
    expect_sound(config, data, model)
    grid = VirtualGrid(client.app.app, len(data.sites), {CONFIG_YAML: dump_run_config(config)}, device, watch)
    settings = RunSettings(RunFolder(folder), resume=resume, device=device, engine=ENGINE)
    around, settings = with_faults(grid, config, data.sites, model, FIRST_NODE_ID, settings)
    return run_federation(around, config, settings, observer)


def new_run_folder(config: RunConfig, runs: Path) -> Path:
    """Return a folder that does not exist yet: ``runs/<name>``, or with a number behind it."""
    folder, number = runs / config.name, 1
    while folder.exists():
        number += 1
        folder = runs / f"{config.name}-{number}"
    return folder


def newest_run_folder(config: RunConfig, runs: Path) -> Path:
    """Return the newest folder of that name with a checkpoint.

    Raises:
        RunError: if there is none.
    """
    found = [
        path.parent.parent
        for path in runs.glob(f"{config.name}*/checkpoint/state.json")
        if path.parent.parent.name.removeprefix(config.name).lstrip("-").isdigit()
        or path.parent.parent.name == config.name
    ]
    if not found:
        raise RunError(f"no run of {config.name!r} in {runs} has a checkpoint; expected one. Run without --resume.")
    return max(found, key=lambda path: (path / "checkpoint" / "state.json").stat().st_mtime_ns)
