"""``fedtune-sim``: simulate a federation on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.console import INTERRUPTED, KEPT, error_console, new_app, one_line_errors
from common.errors import ConfigError
from simulations.commands.baselines import baselines
from simulations.commands.compare import compare
from simulations.commands.options import (
    Address,
    AsJson,
    Cohort,
    Config,
    Debug,
    Device,
    Engine,
    Overrides,
    Threads,
    Workers,
    set_up,
)  # fmt: skip
from simulations.commands.report import report
from simulations.commands.sweep import sweep

if TYPE_CHECKING:
    from simulations.engines.settings import EngineSettings

app = new_app(
    "fedtune-sim",
    "Simulate a federation on this machine: the same round loop, trainer and wire format as a deployment.",
)

MOST_SITES_SHOWN = 60
"""Sites that a table on the screen lists."""


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: a new runs/<name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the run folder.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    engine: Engine = "inprocess",
    workers: Workers = None,
    address: Address = None,
    cohort: Cohort = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder alone.")] = False,
    debug: Debug = False,
) -> None:
    """Run a federation and leave adapter, metrics and summary in the run folder."""
    with one_line_errors(debug, KEPT):
        set_up(debug, threads)
        from simulations.engines.settings import EngineSettings, asked_cohort
        from simulations.run import new_run_folder, newest_run_folder

        chosen = EngineSettings(engine, workers, threads, address, asked_cohort(cohort))
        settings = load_run_config(config, overrides or ())
        runs = Path("runs")
        if out is None:
            folder = newest_run_folder(settings, runs) if resume else new_run_folder(settings, runs)
        else:
            folder = out
        _run(settings, folder, config, overrides or (), engine=chosen, resume=resume, device=device, quiet=quiet)


def _run(
    settings: RunConfig,
    folder: Path,
    config: Path,
    overrides: Sequence[str],
    *,
    engine: EngineSettings,
    resume: bool,
    device: str,
    quiet: bool,
) -> None:
    from simulations.progress import LiveProgress, closing_tables
    from simulations.run import simulate

    console = Console(quiet=quiet)
    try:
        with LiveProgress(console) as progress:
            summary = simulate(settings, folder, resume=resume, device=device, observer=progress, engine=engine)
    except KeyboardInterrupt:
        if (folder / "checkpoint" / "state.json").exists():
            remedy = f"The last complete round is kept. Go on with the same command and --resume --out {folder}."
        else:
            remedy = "No round was complete; nothing is kept."
        error_console().print(f"interrupted. {remedy}", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    for table in closing_tables(summary, settings.data.task):
        console.print(table)
    picture = folder / "partition.png"
    drawn = f", {picture.name}" if find_spec("matplotlib") else "; install the extra 'plots' for partition.png"
    if find_spec("matplotlib"):
        _draw_partition(settings, picture)
    files = f"Run folder: {folder}/ (adapter/, metrics.jsonl, summary.json{drawn})"
    for line in (files, _next_command(settings, config, overrides)):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if quiet:
        sys.stdout.write(f"{folder}\n")


def _draw_partition(settings: RunConfig, path: Path) -> None:
    from common.data.tokens import load_federated_tokens
    from common.models.folder import model_folder
    from simulations.cache import token_cache_folder
    from simulations.partition_picture import draw_partition

    data = load_federated_tokens(settings.data, settings.seed, model_folder(settings.model), token_cache_folder())
    draw_partition(path, settings, data)


def _next_command(settings: RunConfig, config: Path, overrides: Sequence[str]) -> str:
    """Return the line that names the next useful command: the same run under a stricter, or a first, budget.

    It is empty where the run has settings that do not go with that.
    """
    target, change = settings.privacy.target_epsilon, []
    if settings.privacy.unit == "none":
        title, command = "what privacy costs", "run"
        change = ["privacy={unit: example, epsilon: 8}", "aggregation.weights=uniform"]
    elif target is None:
        title, command = "what the noise means", "check"
    else:
        title, command, change = "what a stricter budget costs", "run", [f"privacy.epsilon={target / 4:g}"]
    settable = [*overrides, *change]
    try:
        load_run_config(config, settable)
    except ConfigError:
        return ""
    words = ["fedtune-sim", command, str(config), *(word for one in settable for word in ("--set", one))]
    return f"Next, {title}:  {shlex.join(words)}"


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[Path | None, typer.Option(help="Draw sites and labels into this PNG file.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Validate config, data and model without training, and say what a run would do."""
    with one_line_errors(debug):
        set_up(debug, None)
        from simulations.check import check_run

        settings = load_run_config(config, overrides or ())
        if picture is not None:
            from simulations.study.extra import expect_extra

            expect_extra("plots", "a picture")
        plan = check_run(settings, device)
        if picture is not None:
            _draw_partition(settings, picture)
        if as_json:
            sys.stdout.write(json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
        else:
            _print_plan(plan)


app.command()(baselines)
app.command()(compare)
app.command()(sweep)
app.command()(report)


@app.command()
def audit(
    config: Config,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(min=2, help="Planted rows, each in with probability 1/2.")] = 200,
    guesses: Annotated[int, typer.Option(min=2, help="Guesses about them, half in and half out.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of canaries, coins and noise: another seed, another audit.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Audit folder; default: a new runs/<name>-audit.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Attack a run, with and without its noise, and set the measured ε beside the claimed one."""
    with one_line_errors(debug):
        set_up(debug, threads)
        from simulations.study.extra import expect_extra

        expect_extra("audit", "the audit")
        from simulations.audit.audit import AuditOptions
        from simulations.audit.command import audit_and_print
        from simulations.run import new_run_folder

        settings = load_run_config(config, overrides or ())
        if out is None:
            out = new_run_folder(settings.model_copy(update={"name": f"{settings.name}-audit"}), Path("runs"))
        audit_and_print(settings, out, AuditOptions(canaries, guesses, seed), device=device, as_json=as_json)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder of a run.")],
    base: Annotated[str, typer.Argument(help="Folder of its base model, or package:NAME/folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Fold an adapter into its base model and write the merged model."""
    with one_line_errors(debug):
        set_up(debug, None)
        from common.models.merge import merge_adapter

        merge_adapter(adapter, base, out, device)
        Console().print(f"Merged model: {out}/", markup=False, highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run config."""
    sys.stdout.write(json.dumps(RunConfig.model_json_schema(), indent=2) + "\n")


def _print_plan(plan: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{plan['name']}: {plan['rounds']} rounds, method {plan['method']}",
        title_justify="left",
    )
    columns = list(next(iter(plan["sites"].values())))
    table.add_column("site", overflow="fold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for site, row in list(plan["sites"].items())[:MOST_SITES_SHOWN]:
        table.add_row(escape(site), *(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    if len(plan["sites"]) > MOST_SITES_SHOWN:
        table.caption = f"and {len(plan['sites']) - MOST_SITES_SHOWN:,} more sites; --json lists all"
    console.print(table)
    size = plan["bytes_per_site_and_round"]
    grows = "; from round 2 on a correction to the base too, which grows" if plan["correction_travels"] else ""
    for line in (
        f"{plan['trained_parameters']:,} trained parameters on {plan['base_parameters']:,} frozen, on {plan['device']}",
        f"{size['up']:,} bytes up and {size['down']:,} bytes down for a site and round{grows}",
        f"{plan['test_rows']:,} test rows, {plan['test_rows_also_in_train']:,} of them also in a training part",
        *plan["simulation"],
        plan["privacy_claim"],
        *(f"Warning. {sentence}" for sentence in plan["warnings"]),
        *(f"Advice. {sentence}" for sentence in plan["advice"]),
    ):
        console.print(line, markup=False, highlight=False)


def main() -> None:
    """Entry point of ``fedtune-sim``."""
    app()


if __name__ == "__main__":
    main()
