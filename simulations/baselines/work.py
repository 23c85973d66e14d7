"""The adapters that a federation is measured against, each trained and scored once a seed.

============  ============================================================================
name          whose adapter
============  ============================================================================
``base``      nobody's: the base model as it is, with the adapter as initialised
``alone``     each site's own, trained on its rows alone
``head_only`` a federation's that trains the classification head and nothing else
``joined``    the federation's: the run itself, each site with what it kept to itself
``pooled``    one place's that has the rows of all sites
============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import client.site
from common.config.federation import AggregationConfig
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ConfigError
from common.evaluation import Evaluator, PersonalOf
from common.methods import personal_names
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import Tensors, manifest_of
from server.checkpoint import Checkpoint, load_checkpoint
from simulations.baselines.alone import alone_config, changed_config, pooled_config, pooled_site, train_alone
from simulations.baselines.scores import Scores, load_scores, save_scores
from simulations.run import personal_of_virtual_sites
from simulations.study.runs import Compute, PlannedRun, Watching, do_missing, run_one

BASE, ALONE, HEAD_ONLY, JOINED, POOLED = NAMES = ("base", "alone", "head_only", "joined", "pooled")
TITLES = {
    BASE: "base model as it is",
    ALONE: "each site alone",
    HEAD_ONLY: "head only, federated",
    JOINED: "joined (the federation)",
    POOLED: "pooled (all rows in one place)",
}


@dataclass(frozen=True)
class Work:
    """One adapter to be trained and scored.

    Attributes:
        name: of the baseline.
        config: with its seed.
        path: of the scores.
        site: whose rows, for baseline ``alone``.
    """

    name: str
    config: RunConfig
    path: Path
    site: str | None = None

    @property
    def title(self) -> str:
        """What is said of it while it goes on."""
        return f"{TITLES[self.name]}{f': {self.site}' if self.site else ''}, seed {self.config.seed}"


def plan_work(configs: Mapping[str, RunConfig], seeds: Sequence[int], folder: Path) -> list[Work]:
    """Return all that is to be trained, by baseline, so that a base model is loaded seldom.

    Args:
        configs: of each baseline, seed aside.
        seeds: of the runs.
        folder: of the baselines.
    """
    work = []
    for name, unseeded in configs.items():
        for seed in seeds:
            config = unseeded.model_copy(update={"seed": seed})
            sites = load_federated_data(config.data, seed).sites
            for number, site in enumerate(sites) if name == ALONE else ((0, None),):
                stem = f"{name}-{number}" if site else name
                work.append(Work(name, config, folder / "scores" / f"{stem}--{seed}.safetensors", site))
    return work


def baseline_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Return the config of each baseline; head only where there is a head and it is not the run itself.

    A head has no factors for a method to treat: its updates are averaged, and no site is held to a rank.

    Raises:
        ConfigError: if nothing valid comes of a baseline.
    """
    configs = {BASE: config, ALONE: alone_config(config), JOINED: config, POOLED: config}
    if config.data.task == "classification" and config.adapter.kind != "head_only":
        configs[HEAD_ONLY] = changed_config(
            config, adapter={"kind": "head_only", "target_modules": "auto", "dropout": 0.0},
            aggregation={"method": "fedit", "residual_penalty": AggregationConfig().residual_penalty},
            federation={"virtual_ranks": ()},
        )  # fmt: skip
    return configs


def do_work(
    work: Sequence[Work], folder: Path, *, compute: Compute, watching: Watching, saying: Callable[[str], None]
) -> None:
    """Train and score what is missing; several processes may work side by side.

    Args:
        work: what is to be there.
        folder: of the baselines.
        compute: where the runs compute; the other work in this process, on its device.
        watching: who is told of the federated runs.
        saying: told of everything else as it begins.
    """

    def do(one: Work) -> None:
        if one.name not in (JOINED, HEAD_ONLY):
            saying(one.title)
        adapter, personal = _trained(one, folder, compute, watching)
        data = load_federated_data(one.config.data, one.config.seed)
        evaluator = Evaluator(resident_model(one.config, compute.device), one.config, data.test)
        save_scores(one.path, evaluator.row_sums(adapter, personal), one.config)

    try:
        do_missing(work, lambda one: one.path.exists(), lambda one: one.path, do)
    finally:
        client.site.forget_virtual_sites()


def scores_of(work: Work) -> Scores:
    """Return the scores of work that is done."""
    test = load_federated_data(work.config.data, work.config.seed).test
    return load_scores(work.path, work.config, [site for site in test for _ in test[site]])


def _trained(work: Work, folder: Path, compute: Compute, watching: Watching) -> tuple[Tensors, PersonalOf | None]:
    """Return the whole adapter, and where a site's own tensors are read, which take its place at home."""
    config = work.config
    if work.name in (JOINED, HEAD_ONLY):
        run = PlannedRun(TITLES[work.name], config, folder / "runs" / f"{work.name}--{config.seed}")
        with watching(run) as observer:
            run_one(run, observer, compute)
        start = initial_adapter(resident_model(config, compute.device), config.seed)
        checkpoint = load_checkpoint(RunFolder(run.folder).checkpoint)
        return {**start, **checkpoint.adapter}, _personal(run, checkpoint, start)
    model = resident_model(config, compute.device)
    start = initial_adapter(model, config.seed)
    if work.name == BASE:
        return start, None
    data = load_federated_data(config.data, config.seed)
    if work.name == POOLED:
        pooled = pooled_config(config, data)
        return train_alone(model, pooled_site(pooled, data, model), pooled, start), None
    if work.site not in data.sites:
        raise ConfigError(f"site {work.site!r} has no training rows; expected some to train alone on.")
    node = {"partition-id": data.sites.index(work.site), "num-partitions": len(data.sites)}
    return train_alone(model, client.site.virtual_site(config, node, model), config, start), None


def _personal(run: PlannedRun, checkpoint: Checkpoint, start: Tensors) -> PersonalOf | None:
    """Return where what sites kept up to the checkpoint is read; None where the method lets them keep nothing."""
    names = personal_names(run.config, start)
    if not names:
        return None
    manifest = manifest_of({name: start[name] for name in names})
    kept = personal_of_virtual_sites(RunFolder(run.folder).sites)
    return lambda site: kept(checkpoint.run, checkpoint.round, site, manifest)
