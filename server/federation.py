"""A whole run on a Grid: set-up, rounds, evaluation, checkpoints, and the files it leaves."""

from __future__ import annotations

import logging
import math
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from flwr.serverapp import Grid

from common.atomic import write_atomic
from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from common.config.warnings import config_warnings
from common.data.federated import load_federated_data
from common.data.token_table import TokenRows
from common.errors import RunError
from common.evaluation import Evaluator, PersonalOf
from common.factors import is_fixed
from common.methods import kept_names, kept_tensors, personal_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.export import export_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import Manifest, Tensors, fingerprint, manifest_of
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.clock import Clock, WallClock
from server.cohort import Member, admit_members, expect_members, expect_rule_holds
from server.events import Observer
from server.model_card import model_card
from server.newcomers import Newcomers
from server.progress import Progress
from server.site_level import SiteLevel, site_level_of
from server.steering import Steering
from server.strategy import FederatedTuning
from server.summary import epsilon_by_site, summarise
from server.transport import describe_sites, wait_for_nodes

logger = logging.getLogger(__name__)

Personal = Callable[[str, int, str, Manifest], Tensors]
"""From run, round, site and expected shapes to what the site keeps after the round; nothing where it never did."""


@dataclass(frozen=True)
class RunSettings:
    """Run-time settings: they say where and how to compute, and cannot change results.

    Attributes:
        folder: the run folder.
        resume: go on from its checkpoint.
        device: of the coordinator's own model.
        engine: what carries the messages, for the record.
        clock: what the rounds' deadlines are read from.
        round_notes: what the carrier of the messages adds to the record of a round.
        test: tokenised test rows of each site, where whoever starts the run has them; else they are read.
        personal: what a site kept up to a round, where the coordinator can see it, as in a simulation: sites are then
            evaluated with what is theirs.
        settle: called before each checkpoint, to bring to disk what virtual sites keep, or to raise where nothing more
            may be written.
        steering: asked before each round.
        enrolled: names of the sites by node id, where each has a key of its own: a node that calls itself otherwise is
            left out.
        everyone: whether a site that cannot take part ends the run, rather than being left out.
    """

    folder: RunFolder
    resume: bool = False
    device: str = "auto"
    engine: str = "flower"
    clock: Clock = field(default_factory=WallClock)
    round_notes: Callable[[int], Mapping[str, Any]] | None = None
    test: Mapping[str, TokenRows] | None = None
    personal: Personal | None = None
    settle: Callable[[], None] | None = None
    steering: Steering = field(default_factory=Steering)
    enrolled: Mapping[int, str] | None = None
    everyone: bool = False


def run_federation(
    grid: Grid, config: RunConfig, settings: RunSettings, observer: Observer | None = None
) -> dict[str, Any]:
    """Run, or resume, a federation and return its summary.

    Raises:
        FedtuneError: for whatever keeps it from running; what was checkpointed stays.
    """
    began = time.perf_counter()
    watch = Observer() if observer is None else observer
    folder = settings.folder
    completed = _completed(folder, config) if settings.resume else None
    if completed is None:
        folder.expect_free()
    model = resident_model(config, settings.device)
    start = initial_adapter(model, config.seed)
    nodes = wait_for_nodes(grid, config, () if completed is None else _nodes_before(folder, settings.enrolled or {}))
    described, left_out = describe_sites(grid, nodes, config, settings.clock)
    base, initial = model.base.fingerprint, fingerprint(start)
    members, unfit = admit_members(described, config, base, initial, settings.enrolled)
    left_out |= unfit
    expect_members(len(members), left_out, config, everyone=settings.everyone)
    expect_rule_holds(config, len(members))
    progress = Progress(start) if completed is None else _resumed(completed, config, start, model)
    seeded = all(member.description.seeded for member in members.values())
    site_level = site_level_of(config, len(members), seeded=seeded)
    if completed is not None and site_level is not None:
        _expect_as_many_sites(folder, len(members))
    run = secrets.token_hex(16) if completed is None else completed.run
    keeper = _Keeper(config, settings, model, watch, run, site_level)
    if completed is None:
        folder.create()
        write_atomic(folder.config, dump_run_config(config).encode())
        keeper.checkpoint(0, progress)
    else:
        folder.rewind(completed.round)
    started = _start_record(config, settings, model, members, time.perf_counter() - began)
    folder.log(started | ({"left_out": left_out} if left_out else {}))
    done = 0 if completed is None else completed.round
    for warning in config_warnings(config, len(members)):
        logger.warning("%s", warning)
    if settings.personal is None and personal_names(config, progress.adapter):
        logger.warning("%s leaves factors at the sites: what is evaluated and exported here has zeros in their place.",
                       config.aggregation.method)  # fmt: skip
    watch.run_started(config, list(members), done)
    if done == 0 and not any(folder.iterate_records("evaluation")):
        keeper.evaluate(0, progress.adapter)
    newcomers = None
    if settings.enrolled is not None and site_level is None:  # which is planned for a number of sites
        newcomers = Newcomers(
            config, settings.clock, settings.enrolled,
            lambda come: admit_members(come, config, base, initial, settings.enrolled, members.values()),
        )  # fmt: skip
    strategy = FederatedTuning(
        config=config, members=members, progress=progress, base_fingerprint=base, run=run,
        site_level=site_level, observer=watch, clock=settings.clock, steering=settings.steering, newcomers=newcomers,
        completed_rounds=done, round_done=keeper.round_done,
    )  # fmt: skip
    strategy.start(grid)
    keeper.evaluate_last(strategy.completed_rounds, strategy.progress.adapter)
    exported = export_adapter(model, strategy.progress.adapter, config, folder.adapter)
    summary = summarise(folder.iterate_records(), config)
    folder.write_summary(summary)
    write_atomic(folder.model_card, model_card(config, summary, exported).encode())
    return summary


def _completed(folder: RunFolder, config: RunConfig) -> Checkpoint:
    checkpoint = load_checkpoint(folder.checkpoint)
    if checkpoint.config_digest != config.digest():
        raise RunError(
            f"{folder.path} was started with another config ({_differing(folder, config)}); expected the same. "
            "Resume with the same config, or start afresh with another --out."
        )
    logged = [record["round"] for record in folder.iterate_records("round")]
    if logged[: checkpoint.round] != list(range(1, checkpoint.round + 1)):
        raise RunError(
            f"{folder.metrics} lacks rounds up to the checkpoint's {checkpoint.round}; expected all, since ε is summed "
            "from them. Restore the file or start afresh."
        )
    return checkpoint


def _differing(folder: RunFolder, config: RunConfig) -> str:
    old, new = load_run_config(folder.config).model_dump(), config.model_dump()
    keys = [key for key in new if old.get(key) != new[key]]
    return "differs in " + ", ".join(keys) if keys else "same keys, edited by hand"


def _nodes_before(folder: RunFolder, enrolled: Mapping[int, str]) -> list[int]:
    """Return the nodes of the sites that took part before."""
    names = {site for record in folder.iterate_records("start") for site in record["sites"]}
    names |= {site for record in folder.iterate_records("round") for site in record["sites"]}
    return [node for node, name in enrolled.items() if name in names]


def _resumed(checkpoint: Checkpoint, config: RunConfig, start: Tensors, model: AdaptedModel) -> Progress:
    if checkpoint.base_fingerprint != model.base.fingerprint:
        raise RunError("the checkpoint belongs to another base model; expected the one it was started with.")
    if {name for name in checkpoint.adapter if not is_fixed(name)} != kept_names(config, start):
        raise RunError("the checkpoint holds other tensors than this config trains; expected the same.")
    return Progress(start | checkpoint.adapter, checkpoint.clip_norm, checkpoint.moments, checkpoint.controls)


def _expect_as_many_sites(folder: RunFolder, number: int) -> None:
    """Noise and sampling of site-level privacy are planned for a number of sites; another one would be another plan."""
    planned = next(len(record["sites"]) for record in folder.iterate_records("start"))
    if number != planned:
        raise RunError(
            f"{number} sites are connected but site-level privacy was planned for {planned}; expected as many. "
            "Bring the others back, or start afresh."
        )


def _start_record(
    config: RunConfig,
    settings: RunSettings,
    model: AdaptedModel,
    members: Mapping[str, Member],
    seconds: float,
) -> dict[str, Any]:
    packages = ("flwr", "torch", "transformers", "peft", "opacus")
    return {
        "kind": "start",
        "sites": list(members),
        "seconds": seconds,
        "engine": settings.engine,
        "device": str(model.device),
        "repeatable_noise": any(member.description.seeded for member in members.values()),
        "config_digest": config.digest(),
        "base_fingerprint": model.base.fingerprint,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


class _Keeper:
    """What happens after every round: evaluation where due, log, checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        settings: RunSettings,
        model: AdaptedModel,
        watch: Observer,
        run: str,
        site_level: SiteLevel | None,
    ) -> None:
        self._config, self._settings, self._folder, self._model = config, settings, settings.folder, model
        self._watch, self._notes = watch, settings.round_notes
        self._run, self._site_level = run, site_level
        self._evaluator: Evaluator | None = None
        if config.evaluation.enabled:
            test = load_federated_data(config.data, config.seed).test if settings.test is None else settings.test
            self._evaluator = Evaluator(model, config, test) if test else None

    def round_done(self, number: int, progress: Progress, record: dict[str, Any]) -> None:
        if self._notes is not None:
            record = {**record, **self._notes(number)}
        self._folder.log(record)
        every, last = self._config.evaluation.every, self._config.federation.rounds
        if number == last or (every and number % every == 0):
            self.evaluate(number, progress.adapter)
        if self._settings.settle is not None:
            self._settings.settle()
        self.checkpoint(number, progress)
        spent = max(epsilon_by_site(self._folder.iterate_records("round"), self._config).values(), default=None)
        if spent is None and self._site_level is not None:
            spent = self._site_level.mechanism.epsilon_after(number)
        self._watch.round_ended(record, spent)

    def evaluate_last(self, number: int, adapter: Tensors) -> None:
        """Evaluate what a run ends with, where an operator ended it after a round that was not evaluated."""
        if number not in (record["round"] for record in self._folder.iterate_records("evaluation")):
            self.evaluate(number, adapter)

    def evaluate(self, number: int, adapter: Tensors) -> None:
        if self._evaluator is None:
            return
        began = time.perf_counter()
        personal = self._personal(number, adapter)
        evaluation = self._evaluator(adapter, personal)
        if not all(math.isfinite(value) for value in evaluation.overall.values()):
            raise RunError(f"training diverged: round {number} evaluates to no finite loss. Lower training.lr.")
        record = {
            "kind": "evaluation", "round": number, "split": "test", "metrics": evaluation.as_dict(),
            "personal": personal is not None, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        self._folder.log(record)
        self._watch.evaluated(record)

    def _personal(self, number: int, adapter: Tensors) -> PersonalOf | None:
        """Return where a site's own tensors are read; None where no method lets it keep any, or nobody can see them."""
        names, kept = personal_names(self._config, adapter), self._settings.personal
        if not names or kept is None:
            return None
        manifest = manifest_of({name: adapter[name] for name in names})
        return lambda site: kept(self._run, number, site, manifest)

    def checkpoint(self, number: int, progress: Progress) -> None:
        kept, base = kept_tensors(self._config, progress.adapter), self._model.base.fingerprint
        digest, clip_norm = self._config.digest(), progress.clip_norm
        save_checkpoint(
            self._folder.checkpoint,
            Checkpoint(number, kept, digest, base, self._run, clip_norm, progress.moments, progress.controls),
        )
