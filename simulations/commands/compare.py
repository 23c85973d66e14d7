"""``fedtune-sim compare``: several configs over several seeds."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import one_line_errors
from simulations.commands.options import (
    Address,
    AsJson,
    Cohort,
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
    from simulations.study.variants import Variant

Variants = Annotated[
    list[str],
    typer.Argument(
        metavar="[LABEL=]CONFIG[@KEY=VALUE]...",
        help="Run configs; @ changes a key in one of them: A.yaml@aggregation.method=ffa_lora.",
    ),
]


def compare(
    variants: Variants,
    seeds: Seeds = 3,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: runs/compare-..., the same for the same command.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    engine: Engine = "inprocess",
    workers: Workers = None,
    address: Address = None,
    cohort: Cohort = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run every config with every seed and compare: table, pictures, differences paired by seed.

    Complete runs are kept: after Ctrl-C the same command goes on, and several processes may work side by side.
    """
    with one_line_errors(debug):
        from simulations.study.extra import expect_extra

        expect_extra("plots", "a comparison")
        set_up(debug, threads)
        from rich.console import Console

        from simulations.commands.progress import RunLines, kept_on_interrupt
        from simulations.compare.compare import compare as run_comparison
        from simulations.compare.pictures import comparison_pictures
        from simulations.compare.tables import comparison_tables
        from simulations.engines.settings import EngineSettings, asked_cohort
        from simulations.report.write import write_report
        from simulations.study.runs import Compute
        from simulations.study.variants import parse_variants

        chosen = parse_variants(variants, overrides or ())
        folder = _default_folder(chosen) if out is None else out
        console = Console(quiet=as_json)
        compute = Compute(device, EngineSettings(engine, workers, threads, address, asked_cohort(cohort)))
        with kept_on_interrupt():
            done = run_comparison(chosen, range(seeds), folder, compute=compute, watching=RunLines(console))
            for picture in comparison_pictures(done):
                picture.save(folder)
            write_report(folder)
        if as_json:
            sys.stdout.write(json.dumps(done.figures, indent=2, ensure_ascii=False) + "\n")
        for table in comparison_tables(done.figures):
            console.print(table)
        console.print(
            f"Comparison folder: {folder}/ (report.html, compare.json, curves.png, after.png, runs/)",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _default_folder(variants: list[Variant]) -> Path:
    """Return a folder that the same variants always have."""
    text = json.dumps([[variant.label, variant.config.digest()] for variant in variants])
    return Path("runs") / f"compare-{variants[0].config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
