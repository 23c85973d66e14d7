"""Writes ``docs/hostile.md``: what 17 attacks do to every method, with and without the rule that is made for them.

Run it with ``python -m simulations.results.hostile``. Each cell is a run of the embedded clinic data at twelve sites,
two of them hostile, into ``runs/hostile/``; runs that are complete are not repeated, and several processes may work
side by side. Malformed updates are met by admission, which cannot be turned off. Against the others the rule is

* multi_krum against two bad sites;
* a cap on each site's share of the weight, where rows are declared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from simulations.study.runs import PlannedRun, plan_runs, run_missing

ROOT = Path(__file__).resolve().parents[2]
RUNS, PAGE = ROOT / "runs" / "hostile", ROOT / "docs" / "hostile.md"

SITES, HOSTILE, LARGEST_MOVE = 12, 2, 0.05
ATTACKS: tuple[AttackName, ...] = tuple(name for name in get_args(AttackName) if name != "gaussian_noise")
"""The seventeen of the table, a declared weight counted as one: negative or huge."""
WEIGHTS: tuple[AttackName, ...] = ("negative_weight", "huge_weight")
"""Attacks on what sites declare, in a run that is weighted by it."""
WELL_FORMED: tuple[AttackName, ...] = ("denormal_flood", "sign_flip", "scale_1000", "huge_weight")
"""Attacks that admission alone lets in: for these there is a run with the matching rule, and one without."""

KRUM = ["robust: multi_krum", f"robust_sites: {HOSTILE}"]
"""The rule that matches hostile updates."""

Guard = Literal["plain", "guarded"]

EXAMPLE = "fedit sign-flip guarded uniform"
"""A run's label."""

_TOP = ", ".join(f"layer.{layer}.attention.self.{name}" for layer in (4, 5) for name in ("query", "value"))
WORK = (
    "privacy={unit: none}", "training={optimizer: adamw, lr: 1e-2, head_lr: 5e-2, batch_size: 8}",
    f"adapter={{rank: 4, alpha: 8, target_modules: [{_TOP}]}}", "federation={rounds: 3}",
    "evaluation={every: 0, products: false}", "data.max_length=32", "data.max_rows_per_site=24",
    "data.max_test_rows=200", f"data.partition={{kind: iid, sites: {SITES}}}",
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


def cells(methods: Iterable[str], attacks: Sequence[AttackName] = ATTACKS) -> list[Cell]:
    """Return the runs behind the table of some methods and attacks, each once."""
    found: dict[Cell, None] = {}
    for method in methods:
        for attack in (None, *attacks):
            weights: Literal["uniform", "examples"] = "examples" if attack in WEIGHTS else "uniform"
            found[Cell(method, None, "plain", weights)] = None
            found[Cell(method, attack, "plain", weights)] = None
            if attack in WELL_FORMED:
                found[Cell(method, attack, "guarded", weights)] = None
    return list(found)


def planned(cell: Cell, base: RunConfig, runs: Path) -> PlannedRun:
    """Return the run behind a cell; ``base`` is already the cell's config."""
    (run,) = plan_runs(runs, [(cell.label, base)], [0])
    return run


def config_of(cell: Cell) -> RunConfig:
    """Return the run config behind a cell."""
    return load_run_config(ROOT / "configs" / "quickstart.yaml", [*WORK, *cell.overrides()])


def do(cell: Cell, runs: Path, console: Console) -> None:
    """Run a cell unless it is done. What ends a run is kept as its result, in ``ended.txt`` beside its folder."""
    run = planned(cell, config_of(cell), runs)
    if ended(run) is not None:
        return
    try:
        run_missing([run], watching=RunLines(console), keep=True)
    except FedtuneError as error:
        run.folder.with_suffix(".ended.txt").write_text(f"{error}\n", encoding="utf-8")


def ended(run: PlannedRun) -> str | None:
    """Return why a run ended before its time; None where it did not."""
    path = run.folder.with_suffix(".ended.txt")
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def accuracy(cell: Cell, runs: Path) -> float | str | None:
    """Return the accuracy after the run of a cell, "ended" where it ended early, None where it was not run."""
    run = planned(cell, config_of(cell), runs)
    path = run.folder / "summary.json"
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8"))["metrics_after"]["test"]["overall"]["accuracy"])
    return None if ended(run) is None else "ended"


def shown(found: float | str | None, honest: float | str | None = None) -> str:
    """Return an accuracy in percent, marked with ``*`` where it is more than 5 % below the honest one."""
    if found is None:
        return "-"
    if isinstance(found, str):
        return found
    moved = isinstance(honest, float) and honest - found > LARGEST_MOVE * honest
    return f"{100 * found:.1f}" + ("*" if moved else "")


def table(methods: Sequence[str], attacks: Sequence[AttackName], runs: Path) -> str:
    """Return the Markdown table of methods by attacks, from the runs that are complete."""
    lines = [["", *methods], ["---"] * (len(methods) + 1)]
    honest = {(m, w): accuracy(Cell(m, None, "plain", w), runs) for m in methods for w in ("uniform", "examples")}
    lines.append(["honest", *(shown(honest[method, "uniform"]) for method in methods)])
    for attack in attacks:
        weights: Literal["uniform", "examples"] = "examples" if attack in WEIGHTS else "uniform"
        row = []
        for method in methods:
            own = honest[method, weights]
            plain = shown(accuracy(Cell(method, attack, "plain", weights), runs), own)
            if attack in WELL_FORMED:
                guarded = shown(accuracy(Cell(method, attack, "guarded", weights), runs), own)
                row.append(f"**{guarded}** / {plain}")
            else:
                row.append(f"**{plain}**")
        lines.append([f"`{attack}`", *row])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(methods: Sequence[str], runs: Path, page: Path) -> None:
    """Replace what stands between the markers of ``docs/hostile.md``."""
    begin, end = "<!-- hostile: written by python -m simulations.results.hostile -->", "<!-- end of hostile -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise typer.BadParameter(f"{page} lacks the markers of its table")
    before, _, rest = text.partition(begin)
    content = table(methods, ATTACKS, runs)
    page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main(
    only: Annotated[str, typer.Option(help="Run only cells whose label contains this.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    run: Annotated[bool, typer.Option(help="Run what is missing before writing the table.")] = True,
    runs: Annotated[Path, typer.Option(help="Where the run folders are.")] = RUNS,
) -> None:
    """Run what is missing and write the table."""
    set_up(debug=False, threads=threads)
    console = Console()
    methods = list(METHODS)
    with one_line_errors(debug=False):
        chosen = [cell for cell in cells(methods) if only in cell.label]
        if not chosen:
            raise ConfigError(f"--only {only!r} is in no run's label; expected a part of one such as {EXAMPLE!r}.")
        for cell in chosen if run else ():
            do(cell, runs, console)
        write_page(methods, runs, PAGE)


if __name__ == "__main__":
    typer.run(main)
