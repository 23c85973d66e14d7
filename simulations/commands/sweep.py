"""``fedtune-sim sweep``: search settings with Optuna."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import one_line_errors
from common.errors import ConfigError
from simulations.commands.options import (
    Address,
    AsJson,
    Cohort,
    Debug,
    Device,
    Engine,
    Threads,
    Workers,
    set_up,
)  # fmt: skip

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="LOW..HIGH, log:LOW..HIGH, LOW..HIGH/STEP and choice:A,B are searched; other values are set. Repeatable.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=WEIGHT,...",
        help="What is best: metric, worst_site (both added), megabyte, epsilon (both taken off); default metric=1.",
    ),
]


def sweep(
    config: Annotated[Path, typer.Argument(help="Run config, or a sweep plan (YAML with a key 'search').")],
    settings: Settings = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; default 20.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe (default), random or grid.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of a trial; default 1.")] = None,
    objective: Weights = None,
    validation: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of training rows to judge on; default 0.2. 0 takes the test part."),
    ] = None,
    prune: Annotated[bool | None, typer.Option("--prune/--no-prune", help="Stop poor trials after a round.")] = None,
    out: Annotated[Path | None, typer.Option(help="Sweep folder; default: runs/<name>-sweep.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    engine: Engine = "inprocess",
    workers: Workers = None,
    address: Address = None,
    cohort: Cohort = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search settings with Optuna, say what the search costs in privacy, and write the best config.

    Complete trials are kept: after Ctrl-C the same command goes on, and several processes may work side by side. A
    finished sweep is left as it is; with more --trials it goes on.
    """
    with one_line_errors(debug):
        from simulations.study.extra import expect_extra

        expect_extra("sweep", "a sweep")
        set_up(debug, threads)
        from rich.console import Console

        from simulations.commands.progress import RunLines, kept_on_interrupt
        from simulations.engines.settings import EngineSettings, asked_cohort
        from simulations.report.write import write_report
        from simulations.study.runs import Compute
        from simulations.sweep.pictures import sweep_pictures
        from simulations.sweep.plan import load_plan
        from simulations.sweep.search import run_search
        from simulations.sweep.tables import sweep_table

        given = {
            "trials": trials, "sampler": sampler, "seeds": seeds, "validation": validation, "prune": prune,
            "objective": None if objective is None else _weights(objective),
        }  # fmt: skip
        plan = load_plan(config, settings or (), {key: value for key, value in given.items() if value is not None})
        folder = Path("runs") / f"{plan.base().name}-sweep" if out is None else out
        console = Console(quiet=as_json)
        compute = Compute(device, EngineSettings(engine, workers, threads, address, asked_cohort(cohort)))
        with kept_on_interrupt():
            result = run_search(plan, folder, compute=compute, watching=RunLines(console))
            for picture in sweep_pictures(result):
                picture.save(folder)
            write_report(folder)
        if as_json:
            sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        console.print(sweep_table(result))
        for line in (
            *result["privacy_said"],
            f"Sweep folder: {folder}/ (report.html, best.yaml, sweep.json, sweep.db)",
            f"Next, is it better on the test part:  fedtune-sim compare {config} {folder}/best.yaml --seeds 5",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _weights(text: str) -> dict[str, Any]:
    """Read ``metric=1,worst_site=0.5``; what is not named is 0."""
    from common.config.yaml_text import parse_value
    from simulations.sweep.plan import ObjectiveConfig

    weights: dict[str, Any] = dict.fromkeys(ObjectiveConfig.model_fields, 0.0)
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in weights:
            raise ConfigError(
                f"--objective {part.strip()!r} is no weight; expected NAME=WEIGHT of {', '.join(weights)}."
            )
        weights[name] = parse_value(value)
    return weights
