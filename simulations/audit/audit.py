"""The audit: the run as given and the same run without noise, attacked alike, beside what the run claims."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.atomic import write_atomic
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ConfigError
from common.models.resident import resident_model
from common.run_folder import RunFolder
from server.events import Observer
from simulations.audit.audited_run import AuditedRun, run_audited
from simulations.audit.bound import CONFIDENCE, GuessPlan, epsilon_lower_bound, plan_guesses
from simulations.audit.canaries import Canaries, audited_config, make_canaries, write_rows
from simulations.audit.membership import measure_membership
from simulations.audit.plot import draw_roc

AS_GIVEN, NOISE_OFF = "as given", "noise off"
NO_NOISE = 1e-9
"""Noise multiplier of the run without noise; clipping and Poisson sampling stay, so that noise is all that differs."""

Watching = Callable[[], AbstractContextManager[Observer]]

AUDITED_METHODS = ("fedit", "ffa_lora")
"""Aggregation methods whose updates the attack knows how to read."""


@dataclass(frozen=True)
class AuditOptions:
    """How a run is audited.

    Attributes:
        canaries: m, each in with probability 1/2.
        guesses: r, half "in" and half "out", fixed before the run.
        seed: of canaries, coins, initial adapter, sampling and noise: two seeds are two independent audits.
    """

    canaries: int = 200
    guesses: int = 100
    seed: int = 0


def _unwatched() -> AbstractContextManager[Observer]:
    return nullcontext(Observer())


def run_audit(
    config: RunConfig,
    folder: Path,
    options: AuditOptions,
    *,
    device: str = "auto",
    watching: Watching = _unwatched,
) -> dict[str, Any]:
    """Audit ``config`` and write ``audit.json`` and ``roc.png``, with a run folder for each run, into ``folder``.

    The canaries join the rows of the first site. The rows, with those canaries that are in, stand in a temporary
    folder while the runs last.

    Args:
        config: the run config.
        folder: new or empty.
        options: canaries, guesses, seed.
        device: to compute on.
        watching: makes an observer for each run.

    Returns:
        What ``audit.json`` holds; see docs/audit.md.

    Raises:
        FedtuneError: for whatever keeps it from running.
    """
    if config.privacy.unit == "site":
        raise ConfigError(
            "privacy.unit is 'site', which protects no record from the coordinator; expected 'example', 'user' or "
            "'none'. The audit measures what the coordinator learns of single records."
        )
    if config.aggregation.method not in AUDITED_METHODS:
        raise ConfigError(
            f"aggregation.method is {config.aggregation.method!r}; expected one of {', '.join(AUDITED_METHODS)}. The "
            "attack reads updates that hold the same tensors every round, all of which the coordinator knows."
        )
    plan = plan_guesses(options.guesses, options.canaries)
    RunFolder(folder).expect_free()
    data = load_federated_data(config.data, config.seed)
    site = data.sites[0]
    with tempfile.TemporaryDirectory(prefix="fedtune-audit-") as temporary:
        rows = Path(temporary)
        audited = audited_config(config, data, site, options.canaries, rows)
        audited = RunConfig.model_validate(audited.model_dump() | {"seed": options.seed})
        tokenizer = resident_model(audited, device).base.tokenizer
        canaries = make_canaries(options.canaries, audited, data.train[site], site, tokenizer)
        write_rows(data, canaries, audited, rows)
        runs = {}
        for name, settings in _variants(audited).items():
            with watching() as observer:
                runs[name] = run_audited(
                    settings, canaries, folder / name.replace(" ", "-"),
                    noisy=name == AS_GIVEN, device=device, observer=observer,
                )  # fmt: skip
    report = _report(config, canaries, plan, options, runs)
    report["rows_at_site"] = len(data.train[site])
    write_atomic(folder / "audit.json", (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    draw_roc(folder / "roc.png", config.name, canaries.included, runs, report)
    return report


def exceeding(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each measured bound that is above its run's claim; none is expected."""
    return [
        f"{name}: the measured ε ≥ {run[attack]['epsilon_at_least']:.2f} ({attack.replace('_', '-')} guesses, "
        f"{report['confidence']:.0%} confidence) exceeds the claimed ε {run['claimed_epsilon']:.2f}"
        for name, run in report["runs"].items()
        for attack in ("white_box", "black_box")
        if run["claimed_epsilon"] is not None and run[attack]["epsilon_at_least"] > run["claimed_epsilon"]
    ]


def _variants(config: RunConfig) -> dict[str, RunConfig]:
    """The config as given and, where it has noise, without; names of runs are at most 64 characters."""
    variants: dict[str, dict[str, Any]] = {AS_GIVEN: {"name": config.name[:54] + "-audited"}}
    if config.privacy.is_local:
        quiet = {**config.privacy.model_dump(), "epsilon": None, "noise_multiplier": NO_NOISE}
        variants[NOISE_OFF] = {"name": config.name[:54] + "-noiseless", "privacy": quiet}
    return {name: RunConfig.model_validate(config.model_dump() | changes) for name, changes in variants.items()}


def _report(
    config: RunConfig, canaries: Canaries, plan: GuessPlan, options: AuditOptions, runs: dict[str, AuditedRun]
) -> dict[str, Any]:
    delta = config.privacy.delta if config.privacy.is_local else 0.0
    most = epsilon_lower_bound(plan.guesses, plan.guesses, options.canaries, delta)
    report: dict[str, Any] = {
        "name": config.name,
        "unit": config.privacy.unit,
        "delta": delta,
        "site": canaries.site,
        "canaries": options.canaries,
        "canaries_in": sum(canaries.included),
        "guesses_in": plan.guesses_in,
        "guesses_out": plan.guesses_out,
        "confidence": CONFIDENCE,
        "ceiling": most,
        "seed": options.seed,
    }
    report["runs"] = {name: _measured(run, canaries, plan, delta, options.seed) for name, run in runs.items()}
    return report


def _measured(run: AuditedRun, canaries: Canaries, plan: GuessPlan, delta: float, seed: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"claimed_epsilon": run.epsilon if math.isfinite(run.epsilon) else None}
    for attack, scores in (("white_box", run.white_box), ("black_box", run.black_box)):
        correct = plan.correct(scores, canaries.included)
        bound = epsilon_lower_bound(correct, plan.guesses, len(canaries.examples), delta)
        measured[attack] = {"correct": correct, "epsilon_at_least": bound}
    measured["membership"] = (
        asdict(measure_membership(run.members, run.others, seed)) if len(run.others) else None
    )  # fmt: skip
    return measured
