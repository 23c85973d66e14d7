"""``fedtune-sim baselines``: the federation against each site alone, all rows in one place, the head alone, nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import one_line_errors
from common.errors import ConfigError
from simulations.commands.options import (
    Address,
    AsJson,
    Cohort,
    Config,
    Debug,
    Device,
    Engine,
    Overrides,
    Seeds,
    Threads,
    Workers,
    set_up,
)  # fmt: skip

if TYPE_CHECKING:
    from common.config.run import RunConfig

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--change",
        metavar="NAME:KEY=VALUE",
        help="Change a key for one baseline (alone, pooled, head_only): alone:training.lr=1e-3.",
    ),
]


def baselines(
    config: Config,
    seeds: Seeds = 1,
    overrides: Overrides = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: runs/<name>-baselines.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    engine: Engine = "inprocess",
    workers: Workers = None,
    address: Address = None,
    cohort: Cohort = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Does joining beat training alone? By site, with intervals; also pooled, head only and the base model as it is.

    What is complete is kept: after Ctrl-C the same command goes on, and several processes may work side by side.
    """
    with one_line_errors(debug):
        from simulations.study.extra import expect_extra

        expect_extra("plots", "the comparison with baselines")
        set_up(debug, threads)
        from rich.console import Console

        from simulations.baselines.baselines import run_baselines
        from simulations.baselines.pictures import baseline_pictures
        from simulations.baselines.tables import baseline_tables
        from simulations.commands.progress import RunLines, kept_on_interrupt
        from simulations.engines.settings import EngineSettings, asked_cohort
        from simulations.report.write import write_report
        from simulations.study.runs import Compute

        configs = _configs(config, tuple(overrides or ()), tuple(changes or ()))
        folder = Path("runs") / f"{configs['joined'].name}-baselines" if out is None else out
        console = Console(quiet=as_json)
        compute = Compute(device, EngineSettings(engine, workers, threads, address, asked_cohort(cohort)))
        with kept_on_interrupt():
            lines = RunLines(console)
            figures = run_baselines(configs, range(seeds), folder, compute=compute, watching=lines, saying=lines.say)
            for picture in baseline_pictures(figures):
                picture.save(folder)
            write_report(folder)
        if as_json:
            sys.stdout.write(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        for table in baseline_tables(figures):
            console.print(table)
        for line in (
            *(f"{figures['titles'][name]}: {said}" for name, said in figures["privacy"].items() if name == "pooled"),
            *figures["notes"],
            f"Baselines folder: {folder}/ (report.html, baselines.json, gain.png, levels.png)",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _configs(path: Path, overrides: Sequence[str], changes: Sequence[str]) -> dict[str, RunConfig]:
    """Return the config of each baseline, with the changes that are its own.

    Raises:
        ConfigError: for a config that cannot be read, or a change of no baseline that trains.
    """
    from common.config.load import load_run_config
    from simulations.baselines.work import baseline_configs

    configs = baseline_configs(load_run_config(path, overrides))
    own: dict[str, list[str]] = {}
    for change in changes:
        name, colon, override = change.partition(":")
        changeable = [known for known in configs if known not in ("base", "joined")]
        if not colon or name not in changeable:
            raise ConfigError(
                f"--change {change!r} names no baseline; expected one of {', '.join(changeable)}, a colon."
            )
        own.setdefault(name, []).append(override)
    for name, added in own.items():
        configs[name] = baseline_configs(load_run_config(path, [*overrides, *added]))[name]
    return configs
