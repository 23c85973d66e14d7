"""Writes ``docs/hostile.md``: what 17 attacks do to every method, with and without the rule that is made for them.

Run it with ``python -m simulations.results.hostile``. Each cell is a run of the embedded clinic data at twelve sites,
two of them hostile, into ``runs/hostile/``; runs that are complete are not repeated, and several processes may work
side by side. Malformed updates are met by admission, which cannot be turned off: one seed. Against the others, of three
seeds, the rule is

* multi_krum against two bad sites;
* a cap on each site's share of the weight, where rows are declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal, get_args

import typer
from rich.console import Console

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.config.simulation import AttackName
from common.console import one_line_errors
from common.errors import ConfigError, FedtuneError
from common.methods import METHODS
from simulations.commands.options import set_up
from simulations.commands.progress import RunLines
from simulations.results.page import markdown, write_tables
from simulations.study.intervals import over_seeds
from simulations.study.runs import PlannedRun, plan_runs, run_missing
from simulations.study.shown import NOTHING, signed_interval

ROOT = Path(__file__).resolve().parents[2]
RUNS, PAGE = ROOT / "runs" / "hostile", ROOT / "docs" / "hostile.md"
COMMAND = "python -m simulations.results.hostile"

SITES, HOSTILE, LARGEST_MOVE, SEEDS = 12, 2, 0.05, 3
ATTACKS: tuple[AttackName, ...] = tuple(name for name in get_args(AttackName) if name != "gaussian_noise")
"""The seventeen of the table, a declared weight counted as one: negative or huge."""
WEIGHTS: tuple[AttackName, ...] = ("negative_weight", "huge_weight")
"""Attacks on what sites declare, in a run that is weighted by it."""
WELL_FORMED: tuple[AttackName, ...] = ("denormal_flood", "sign_flip", "scale_1000", "huge_weight")
"""Attacks that admission alone lets in: for these there are runs with the matching rule, and without."""
MALFORMED: tuple[AttackName, ...] = tuple(name for name in ATTACKS if name not in WELL_FORMED)
"""Those that it refuses."""

KRUM = ["robust: multi_krum", f"robust_sites: {HOSTILE}"]
"""The rule that matches hostile updates."""

Guard = Literal["plain", "guarded"]

EXAMPLE = "fedit sign-flip guarded uniform"
"""A run's label."""

_TOP = ", ".join(f"layer.{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value"))
WORK = (
    "privacy={unit: none}", "training={optimizer: adamw, lr: 1e-2, head_lr: 5e-2, batch_size: 8}",
    f"adapter={{rank: 4, alpha: 8, target_modules: [{_TOP}]}}", "federation={rounds: 3}",
    "evaluation={every: 0, products: false}", "data.max_length=32", "data.max_rows_per_site=64",
    "data.max_test_rows=400", f"data.partition={{kind: iid, sites: {SITES}}}",
)  # fmt: skip
"""What makes the quickstart's config a run of seconds."""


@dataclass(frozen=True)
class Cell:
    """A run of the grid.

    Attributes:
        method: aggregation method.
        attack: what the hostile sites do; None for an honest run.
        guard: whether the matching rule is on.
        weights: how sites are weighted.
    """

    method: str
    attack: AttackName | None
    guard: Guard
    weights: Literal["uniform", "examples"] = "uniform"

    @property
    def label(self) -> str:
        """What the run is called."""
        return f"{self.method} {self.attack or 'honest'} {self.guard} {self.weights}".replace("_", "-")

    def overrides(self) -> tuple[str, ...]:
        """Return what the run changes in the work."""
        rules = [f"method: {self.method}", f"weights: {self.weights}"]
        if self.guard == "guarded":
            rules += [f"max_weight: {1.2 / SITES:g}"] if self.weights == "examples" else KRUM
        found = (f"aggregation={{{', '.join(rules)}}}",)
        if self.attack is None:
            return found
        share = HOSTILE / SITES
        return (*found, f"simulation={{attacks: [{{name: {self.attack}, share: {share:.6f}}}]}}")


def weights_of(attack: AttackName | None) -> Literal["uniform", "examples"]:
    """Return how sites are weighted in the runs of an attack."""
    return "examples" if attack in WEIGHTS else "uniform"


def cells(methods: Iterable[str], attacks: Sequence[AttackName] = ATTACKS) -> list[Cell]:
    """Return the runs behind the tables of some methods and attacks, each once."""
    found: dict[Cell, None] = {}
    for method in methods:
        for attack in (None, *attacks):
            weights = weights_of(attack)
            found[Cell(method, None, "plain", weights)] = None
            found[Cell(method, attack, "plain", weights)] = None
            if attack in WELL_FORMED:
                found[Cell(method, attack, "guarded", weights)] = None
    return list(found)


def seeds_of(cell: Cell) -> range:
    """Return the seeds of a cell: one of what admission refuses, else all."""
    return range(1 if cell.attack in MALFORMED else SEEDS)


def planned(cell: Cell, runs: Path) -> list[PlannedRun]:
    """Return the runs behind a cell, by seed."""
    return plan_runs(runs, [(cell.label, config_of(cell))], seeds_of(cell))


def config_of(cell: Cell) -> RunConfig:
    """Return the run config behind a cell, of seed 0."""
    return load_run_config(ROOT / "configs" / "quickstart.yaml", [*WORK, *cell.overrides()])


def do(run: PlannedRun, console: Console) -> None:
    """Make a run unless it is done. What ends it is kept as its result, in ``<run>.ended.txt`` beside its folder."""
    if _ended(run).exists():
        return
    try:
        run_missing([run], watching=RunLines(console), keep=True)
    except FedtuneError as error:
        _ended(run).write_text(f"{error}\n", encoding="utf-8")


def _ended(run: PlannedRun) -> Path:
    return run.folder.with_name(f"{run.folder.name}.ended.txt")


Result = float | Literal["ended"] | None
"""Accuracy after a run, "ended" where it ended before its last round, None where it was not made."""


def result(run: PlannedRun) -> Result:
    """Return what came of a run."""
    summary = run.summary()
    if summary is None:
        return "ended" if _ended(run).exists() else None
    return float(summary["metrics_after"]["test"]["overall"]["accuracy"])


def shown(found: Sequence[Result], honest: Sequence[Result]) -> str:
    """Return a mean accuracy in percent, marked with ``*`` where it is more than 5 % below the honest runs'."""
    if "ended" in found:
        return "ended"
    reached = [one for one in found if isinstance(one, float)]
    if len(reached) < len(found):
        return NOTHING
    own = [one for one in honest[: len(found)] if isinstance(one, float)]
    moved = len(own) == len(found) and mean(own) - mean(reached) > LARGEST_MOVE * mean(own)
    return f"{100 * mean(reached):.1f}" + ("*" if moved else "")


def moved_by(found: Sequence[Result], honest: Sequence[Result]) -> str:
    """Return what an attack adds to accuracy in points, paired by seed, with its interval over seeds."""
    if "ended" in found:
        return "ended"
    pairs = [(one, own) for one, own in zip(found, honest, strict=True) if isinstance(one, float)]
    gains = [100.0 * (one - own) for one, own in pairs if isinstance(own, float)]
    return signed_interval(over_seeds(gains)) if len(gains) == len(found) else NOTHING


def malformed_table(methods: Sequence[str], runs: Path) -> str:
    """Return the Markdown table of what admission refuses, attacks by methods, beside honest runs of the same seed."""
    rows = [["", *methods], ["honest", *(_alone(Cell(m, None, "plain"), runs) for m in methods)]]
    for attack in MALFORMED:
        rows.append([f"`{attack}`", *(_alone(Cell(m, attack, "plain", weights_of(attack)), runs) for m in methods)])
    return markdown(rows)


def _alone(cell: Cell, runs: Path) -> str:
    honest = [result(run) for run in planned(Cell(cell.method, None, "plain", cell.weights), runs)]
    return shown([result(run) for run in planned(cell, runs)][:1], honest)


def well_formed_table(methods: Sequence[str], runs: Path) -> str:
    """Return the Markdown table of what admission lets in: method and attack by rule."""
    rows = [["attack", "method", "honest", "with the rule", "minus honest (points)", "without"]]
    for attack in WELL_FORMED:
        weights = weights_of(attack)
        for method in methods:
            own: list[tuple[AttackName | None, Guard]] = [(None, "plain"), (attack, "guarded"), (attack, "plain")]
            honest, guarded, plain = (
                [result(run) for run in planned(Cell(method, what, guard, weights), runs)] for what, guard in own
            )
            found = [shown(honest, honest), f"**{shown(guarded, honest)}**", moved_by(guarded, honest)]
            rows.append([f"`{attack}`", method, *found, shown(plain, honest)])
    return markdown(rows)


def main(
    only: Annotated[str, typer.Option(help="Run only cells whose label contains this.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    run: Annotated[bool, typer.Option(help="Run what is missing before writing the tables.")] = True,
    runs: Annotated[Path, typer.Option(help="Where the run folders are.")] = RUNS,
) -> None:
    """Run what is missing and write the tables."""
    set_up(debug=False, threads=threads)
    console = Console()
    methods = list(METHODS)
    with one_line_errors(debug=False):
        chosen = [cell for cell in cells(methods) if only in cell.label]
        if not chosen:
            raise ConfigError(f"--only {only!r} is in no run's label; expected a part of one such as {EXAMPLE!r}.")
        for one in (one for cell in chosen if run for one in planned(cell, runs)):
            do(one, console)
        tables = {"malformed": malformed_table(methods, runs), "well-formed": well_formed_table(methods, runs)}
        write_tables(PAGE, tables, COMMAND)


if __name__ == "__main__":
    typer.run(main)
