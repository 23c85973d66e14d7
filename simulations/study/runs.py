"""Runs with seeds in a folder of theirs: done once, resumable, by one process or several side by side.

::

    runs/<label>--<seed>/        the run folder
    runs/.<label>--<seed>.lock   held by the process that is at it; the system lets go of it when the process ends
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import typer

import client.site
from common.config.data import DataConfig
from common.config.load import load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.run_folder import RunFolder
from server.events import Observer
from simulations.engines.settings import EngineSettings
from simulations.run import simulate
from simulations.study.variants import slug

POLL_S = 0.5
"""Seconds between looks at a run that another process is at."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be there.

    Attributes:
        label: of what is run.
        config: with its seed.
        folder: the run folder.
    """

    label: str
    config: RunConfig
    folder: Path

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.seed

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a complete run, None of one that is not.

        Raises:
            ConfigError: if the folder holds a run of another config.
        """
        self._expect_same_config()
        path = RunFolder(self.folder).summary
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found

    def _expect_same_config(self) -> None:
        kept = RunFolder(self.folder).config
        if kept.exists() and load_run_config(kept) != self.config:
            raise ConfigError(
                f"{self.folder} holds a run of another config; expected {self.label!r} with seed {self.seed}. "
                "Choose another --out."
            )


@dataclass(frozen=True)
class Compute:
    """Where runs compute; it cannot change their results.

    Attributes:
        device: to compute on.
        engine: what computes the sites.
    """

    device: str = "auto"
    engine: EngineSettings = field(default_factory=EngineSettings)


HERE = Compute()
"""In this process, on the device that is there."""

Task = TypeVar("Task")

Watching = Callable[[PlannedRun], AbstractContextManager[Observer]]
"""Gives whoever is told of a run while it goes on."""


def unwatched(_: PlannedRun) -> AbstractContextManager[Observer]:
    """Watch nothing."""
    return nullcontext(Observer())


def plan_runs(folder: Path, configs: Sequence[tuple[str, RunConfig]], seeds: Sequence[int]) -> list[PlannedRun]:
    """Return the runs of labelled configs with every seed, all of one seed before the next.

    Raises:
        ConfigError: for two labels whose folders would be one.
    """
    slugs = {label: slug(label) or f"variant-{number}" for number, (label, _) in enumerate(configs, start=1)}
    if len(set(slugs.values())) < len(slugs):
        raise ConfigError(f"labels {', '.join(slugs)} give one folder to two; expected letters and digits that differ.")
    return [
        PlannedRun(label, config.model_copy(update={"seed": seed}), folder / f"{slugs[label]}--{seed}")
        for seed in seeds
        for label, config in configs
    ]


def run_missing(
    planned: Sequence[PlannedRun], *, compute: Compute = HERE, watching: Watching = unwatched, keep: bool = False
) -> None:
    """Run what is not complete; what another process is at is waited for, and taken over should that process end.

    Args:
        planned: in the order to run them.
        compute: on what.
        watching: who is told of each.
        keep: whether what the lower blocks make of the rows is kept while the data stay the same, also for a next
            call. Sites, and the models they hold, pile up: for runs that have one model.

    Raises:
        FedtuneError: for whatever keeps a run from completing; complete runs and checkpoints are kept.
    """
    held: tuple[DataConfig, int] | None = None

    def run(missing: PlannedRun) -> None:
        nonlocal held
        data = (missing.config.data, missing.seed)
        if held not in (None, data):
            client.site.forget_virtual_sites()
        held = data
        with watching(missing) as observer:
            run_one(missing, observer, compute, forget=not keep)

    do_missing(planned, lambda one: one.summary() is not None, lambda one: one.folder, run)


@contextmanager
def timed(run: PlannedRun) -> Iterator[Observer]:
    """Watch nothing of a run, and print the CPU seconds it took."""
    began = time.process_time()
    yield Observer()
    typer.echo(f"{run.label}, seed {run.seed}: {time.process_time() - began:.1f} s of CPU")


def do_missing(
    tasks: Sequence[Task], is_done: Callable[[Task], bool], place: Callable[[Task], Path], do: Callable[[Task], None]
) -> None:
    """Do each task that is not done, under the lock of its place, until all are done here or in another process.

    Args:
        tasks: in the order to do them.
        is_done: whether a task's result is there.
        place: where its result goes; the lock lies beside it.
        do: does it; called with the lock held, for a task that is not done.
    """
    pending = [task for task in tasks if not is_done(task)]
    while pending:
        left = []
        for task in pending:
            with run_lock(place(task)) as free:
                if not free:
                    left.append(task)
                elif not is_done(task):
                    do(task)
        if len(left) == len(pending):
            time.sleep(POLL_S)
        pending = left


def run_one(
    run: PlannedRun, observer: Observer | None, compute: Compute = HERE, *, forget: bool = True
) -> dict[str, Any]:
    """Run, or go on with, a run whose lock is held; return its summary.

    Args:
        run: what to run.
        observer: told what happens.
        compute: on what.
        forget: whether to let go of the data afterwards; not where the next run has the same.
    """
    done = run.summary()
    if done is not None:
        return done
    folder = RunFolder(run.folder)
    resume = (folder.checkpoint / "state.json").exists()
    if not resume and run.folder.exists():
        _remove_unstarted(run.folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return simulate(
            run.config, run.folder, resume=resume, device=compute.device, observer=observer, engine=compute.engine
        )
    finally:
        # Virtual sites are kept by run config; over many runs they, and the models they hold, would pile up.
        if forget:
            client.site.forget_virtual_sites()


@contextmanager
def run_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run folder; yields whether it was free."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _remove_unstarted(folder: Path) -> None:
    """Remove a run folder that was made but has no checkpoint: nothing was trained in it.

    Raises:
        RunError: if it holds anything that a run without a checkpoint would not.
    """
    held = {path.name for path in folder.iterdir()}
    if held - {"checkpoint", "config.yaml"} or (held and "checkpoint" not in held):
        raise RunError(f"{folder} is no run folder; expected a run or nothing. Choose another --out.")
    shutil.rmtree(folder)
