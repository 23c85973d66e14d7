"""A virtual federation: the deployment's own coordinator and site code on a virtual grid and an engine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.personal import STATE, PersonalStore, virtual_states
from common.config.run import RunConfig
from common.data.tokens import load_federated_tokens
from common.errors import RunError
from common.models.folder import model_folder
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import Manifest, Tensors
from server.clock import IdleClock
from server.events import Observer
from server.federation import Personal, RunSettings, run_federation
from simulations.cache import token_cache_folder
from simulations.check import expect_sound
from simulations.cohort.size import cohort_size
from simulations.engines.app_handler import FIRST_NODE_ID
from simulations.engines.catalog import open_engine
from simulations.engines.settings import EngineSettings
from simulations.faults.around import with_faults
from simulations.grid import VirtualGrid, Watch


def simulate(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    observer: Observer | None = None,
    watch: Watch | None = None,
    engine: EngineSettings | None = None,
) -> dict[str, Any]:
    """Run ``config`` with one virtual node a site and return the summary.

    Args:
        config: the run config.
        folder: the run folder; new, or one with a checkpoint when resuming.
        resume: go on from the checkpoint.
        device: to compute on.
        observer: told what happens.
        watch: told what passes between coordinator and sites.
        engine: what computes the sites' replies; by default this process. It cannot change results, save for their
            last bits where sites are trained together.

    Raises:
        FedtuneError: for whatever keeps it from running.
    """
    data = load_federated_tokens(config.data, config.seed, model_folder(config.model), token_cache_folder())
    chosen = engine or EngineSettings()
    run_folder = RunFolder(folder)
    chosen = replace(chosen, cohort=cohort_size(chosen.cohort, config, device))
    rows = [len(data.train[site]) for site in data.sites]
    with closing(open_engine(chosen, config, len(rows), device, {STATE: str(run_folder.sites)}, rows)) as running:
        model = resident_model(config, device)
        expect_sound(config, data, model)
        settings = RunSettings(
            run_folder, resume=resume, device=device, engine=chosen.label(), test=data.test, clock=IdleClock(),
            personal=personal_of_virtual_sites(run_folder.sites), settle=virtual_states(run_folder.sites).sync,
            everyone=config.simulation is None or not config.simulation.attacks,
        )  # fmt: skip
        grid = VirtualGrid(running, len(data.sites), watch)
        around, settings = with_faults(grid, config, data.sites, model, FIRST_NODE_ID, settings)
        return run_federation(around, config, settings, observer)


def personal_of_virtual_sites(state: Path) -> Personal:
    """Return what reads the tensors that virtual sites keep in the file ``state``, to evaluate each with its own."""

    def kept(run: str, number: int, site: str, manifest: Manifest) -> Tensors:
        return PersonalStore.of_virtual_site(state, site).before(run, number + 1, manifest)

    return kept


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
