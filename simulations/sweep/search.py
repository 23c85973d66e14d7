"""A search: trials asked of Optuna, run as any other run, told back; resumable, also side by side.

::

    sweep.yaml     the plan
    sweep.db       Optuna's storage (SQLite)
    trials/        the run folders, by what was run: a trial cut short goes on where it was
    sweep.json     figures of all trials, the best, and what the search costs in privacy
    best.yaml      the run config with the best settings, to be run with other seeds
    trials.png, settings.png, report.html
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from common.atomic import write_atomic
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import ConfigError, PrivacyError, RunError
from common.tasks.catalog import TASKS
from server.events import Observer
from server.outcome import Outcome
from simulations.study.curves import curve
from simulations.study.runs import HERE, Compute, PlannedRun, Watching, do_missing, run_lock, run_one, unwatched
from simulations.sweep.cost import cost_sentences, search_cost
from simulations.sweep.files import BEST, PLAN, RESULT, STORAGE
from simulations.sweep.plan import SweepPlan
from simulations.sweep.space import Value, grid_points

logger = logging.getLogger(__name__)

_FAILED = "failed"
"""User attribute of a trial that failed by itself; a failed one without it was cut short from outside."""


def run_search(
    plan: SweepPlan, folder: Path, *, compute: Compute = HERE, watching: Watching = unwatched
) -> dict[str, Any]:
    """Make the trials that are missing and write the results. A finished search is left as it is.

    Args:
        plan: the sweep.
        folder: its folder; new, or one of the same plan, perhaps with fewer trials.
        compute: where the runs compute.
        watching: who is told of each run.

    Raises:
        ConfigError: if the folder holds another sweep or something else.
        RunError: if all trials failed: they diverged, or their settings do not go together. While others are left, one
            that fails is noted and the search goes on.
        FedtuneError: for whatever else keeps a trial from running.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _open_folder(plan, folder)
    study = _study(plan, folder)
    with _turn(folder):
        _ask_again(study, folder)
        if plan.sampler == "grid":
            for point in grid_points(plan.dimensions()):
                study.enqueue_trial(dict(point), skip_if_exists=True)
    wanted = min(plan.trials, len(grid_points(plan.dimensions()))) if plan.sampler == "grid" else plan.trials
    while _one_trial(plan, study, folder, wanted, compute, watching):
        pass
    result = _result(plan, study, folder)
    write_atomic(folder / RESULT, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    if result["trials"] and all(trial["state"] == _FAILED for trial in result["trials"]):
        reason = next(trial.user_attrs[_FAILED] for trial in study.trials if _FAILED in trial.user_attrs)
        raise RunError(f"all {len(result['trials'])} trials failed; expected one that runs. The first: {reason}")
    if result["best"] is not None:
        best = plan.chosen(result["best"]["params"])
        best = best.model_copy(update={"name": f"{best.name[:59]}-best"})
        write_atomic(folder / BEST, dump_run_config(best).encode())
    return result


def _open_folder(plan: SweepPlan, folder: Path) -> None:
    path = folder / PLAN
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no sweep; expected a new folder. Choose another --out.")
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    else:
        kept = SweepPlan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        if kept.model_copy(update={"trials": plan.trials}) != plan:
            raise ConfigError(f"{folder} holds another sweep; expected the same but for trials. Choose another --out.")
    write_atomic(path, yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode())


def _study(plan: SweepPlan, folder: Path) -> optuna.Study:
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=4, n_min_trials=3) if plan.prune else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STORAGE).resolve()}", study_name="sweep", direction="maximize", pruner=pruner,
        load_if_exists=True,
    )  # fmt: skip
    # A sampler begins anew with every start: with the same seed it would propose the first trials again.
    seed = (plan.seed + len(study.trials)) % 2**32
    if plan.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    return study


def _one_trial(
    plan: SweepPlan, study: optuna.Study, folder: Path, wanted: int, compute: Compute, watching: Watching
) -> bool:
    """Make one trial; return whether there was one left to make."""
    with ExitStack() as held:
        with _turn(folder):
            states = [trial.state for trial in study.trials if not _cut_short(trial)]
            if sum(state != TrialState.WAITING for state in states) >= wanted:
                return False
            trial = study.ask({dimension.key: dimension.distribution for dimension in plan.dimensions()})
            held.enter_context(run_lock(_lock(folder, trial.number)))
        try:
            config = plan.trial_config(trial.params)
            study.tell(trial, _value(plan, trial, config, folder, compute, watching))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except (ConfigError, PrivacyError, RunError) as error:
            logger.warning("trial %d failed: %s", trial.number + 1, error)
            trial.set_user_attr(_FAILED, str(error))
            study.tell(trial, state=TrialState.FAIL)
    return True


def _value(
    plan: SweepPlan, trial: optuna.Trial, config: RunConfig, folder: Path, compute: Compute, watching: Watching
) -> float:
    headline = TASKS[config.data.task].headline
    values = []
    for seed in range(plan.seeds):
        run = _run(folder, config, seed)
        run = PlannedRun(f"trial {trial.number + 1}: {_shown(trial.params)}", run.config, run.folder)
        offset = seed * (config.federation.rounds + 1)

        def do(run: PlannedRun, offset: int = offset) -> None:
            with watching(run) as shown:
                run_one(run, _Judge(plan, trial, run, shown, offset), compute)

        do_missing([run], lambda one: one.summary() is not None, lambda one: one.folder, do)
        values.append(plan.objective.score(curve(run.folder, run.config, headline)[-1], headline))
    return sum(values) / len(values)


class _Judge(Observer):
    """Tells Optuna what a trial is worth after every evaluated round, and ends it where Optuna says so.

    A trial ends after the round's checkpoint, so that its folder holds whole rounds.
    """

    def __init__(self, plan: SweepPlan, trial: optuna.Trial, run: PlannedRun, shown: Observer, offset: int) -> None:
        self._plan, self._trial, self._run, self._offset = plan, trial, run, offset
        self._headline = TASKS[run.config.data.task].headline
        self._shown = shown
        self._told: set[int] = set()

    def run_started(self, config: RunConfig, sites: Sequence[str], completed_rounds: int) -> None:
        """Pass it on."""
        self._shown.run_started(config, sites, completed_rounds)

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        """Pass it on."""
        self._shown.round_started(number, cohort)

    def sites_asked(self, number: int, sites: Sequence[str]) -> None:
        """Pass it on."""
        self._shown.sites_asked(number, sites)

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        """Pass it on."""
        self._shown.site_answered(number, site, outcome)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Pass it on."""
        self._shown.evaluated(record)

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """Report what is new and prune."""
        self._shown.round_ended(record, epsilon)
        for point in curve(self._run.folder, self._run.config, self._headline):
            if point.round > 0 and point.round not in self._told:
                self._told.add(point.round)
                self._trial.report(self._plan.objective.score(point, self._headline), self._offset + point.round)
        unfinished = record["round"] < self._run.config.federation.rounds
        if self._plan.prune and unfinished and self._trial.should_prune():
            raise optuna.TrialPruned


def _run(folder: Path, config: RunConfig, seed: int) -> PlannedRun:
    config = config.model_copy(update={"seed": seed})
    return PlannedRun(config.name, config, folder / "trials" / config.digest()[:16])


def _runs(plan: SweepPlan, folder: Path, params: dict[str, Value]) -> list[PlannedRun]:
    """Return the runs of a trial; none of one whose settings do not go together."""
    try:
        config = plan.trial_config(params)
    except ConfigError:
        return []
    return [_run(folder, config, seed) for seed in range(plan.seeds)]


def _ask_again(study: optuna.Study, folder: Path) -> None:
    """Queue anew what was cut short: trials that are running by their state, but that no process is at."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        with run_lock(_lock(folder, trial.number)) as free:
            if free:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)


def _cut_short(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and _FAILED not in trial.user_attrs


def _lock(folder: Path, number: int) -> Path:
    return folder / "trials" / f"trial-{number}"


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait for a turn among the processes of a sweep: who looks at what is running, and asks, does so alone."""
    with (folder / ".turn.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shown(params: dict[str, Value]) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
        for key, value in params.items()
    )


def _result(plan: SweepPlan, study: optuna.Study, folder: Path) -> dict[str, Any]:
    base = plan.first_config()
    headline = TASKS[base.data.task].headline
    trials: list[dict[str, Any]] = []
    runs: dict[int, list[tuple[RunConfig, Path]]] = {}
    for trial in study.trials:
        if trial.state in (TrialState.WAITING, TrialState.RUNNING) or _cut_short(trial):
            continue
        own = [run for run in _runs(plan, folder, trial.params) if run.folder.exists()]
        runs[trial.number] = [(run.config, run.folder) for run in own]
        points = [curve(run.folder, run.config, headline) for run in own]
        trials.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower() if _FAILED not in trial.user_attrs else _FAILED,
                "params": trial.params,
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "reported": trial.intermediate_values,
                "headline": [part[-1].headline for part in points if part],
                "worst_site": [part[-1].worst for part in points if part],
                "megabytes": [part[-1].megabytes for part in points if part],
                "epsilon": [part[-1].epsilon for part in points if part],
                "rounds": [part[-1].round for part in points if part],
            }
        )
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: float(trial["value"]), default=None)
    cost = search_cost(
        list({folder: run for own in runs.values() for run in own for folder in (run[1],)}.values()),
        [] if best is None else runs[best["number"]],
    )
    judged_on = (
        f"{100 * base.data.test_fraction:.0f} % of each site's training rows, held out"
        if base.data.test is None
        else "the test part, where the best now looks better than it is"
    )
    return {
        "kind": "sweep",
        "name": base.name,
        "headline": headline,
        "plan": plan.model_dump(mode="json"),
        "log": [dimension.key for dimension in plan.dimensions() if dimension.log],
        "judged_on": judged_on,
        "trials": trials,
        "best": best,
        "privacy": cost,
        "privacy_said": cost_sentences(cost, judged_on),
    }
