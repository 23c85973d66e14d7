"""The tables of ``docs/methods.md``, from the runs of the grid that are complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from common.run_folder import RunFolder
from common.tasks.catalog import TASKS
from simulations.results.method_grid import FEDERATIONS, PRIVACIES, RATED_FEDERATIONS, RATED_METHODS, RATES, Cell
from simulations.results.page import markdown
from simulations.study.curves import Point, curve
from simulations.study.intervals import over_seeds
from simulations.study.shown import NOTHING, mean_and_half, signed_interval

SHARE_OF_BEST = 0.9
"""The target of a federation and privacy: this share of the best mean accuracy of an adapter for all sites there."""

PAIRS: tuple[tuple[str, str, float, str], ...] = (
    ("no DP", "rolora", 1.0, "fedit"),
    ("ε = 6", "fedsvd", 1.0, "ffa_lora"),
    ("ε = 6", "fedsvd", 0.58, "ffa_lora"),
)
"""Differences that are shown, first method, with the factor on its rate, minus second, by privacy."""

Curves = Mapping[Cell, Mapping[int, Sequence[Point]]]


@dataclass(frozen=True)
class Findings:
    """What the complete runs of a size came to.

    Attributes:
        size: of the grid.
        curves: by cell and seed, the evaluations in order.
    """

    size: str
    curves: Curves

    def final(self, cell: Cell) -> dict[int, float]:
        """Return the accuracy after the last round, in per cent, by seed."""
        return {seed: 100 * points[-1].headline for seed, points in self.curves.get(cell, {}).items()}

    def target(self, federation: str, privacy: str) -> float | None:
        """Return the target accuracy of a column, in per cent; None without any run."""
        means = [
            mean(found.values())
            for method in METHODS
            if not METHODS[method].personal and (found := self.final(Cell(self.size, federation, privacy, method)))
        ]
        return SHARE_OF_BEST * max(means) if means else None

    def megabytes_to(self, cell: Cell, target: float) -> list[float]:
        """Return the bytes up and down, all sites, until an evaluation is at the target: those of seeds that are."""
        reached = []
        for points in self.curves.get(cell, {}).values():
            found = next((point.megabytes for point in points if 100 * point.headline >= target), None)
            reached += [] if found is None else [found]
        return reached


def read_findings(size: str, cells: Sequence[Cell], seeds: range, runs: Path) -> Findings:
    """Return what the complete runs of some cells came to.

    Raises:
        ConfigError: if a folder holds a run of another config; where its data lay does not matter.
    """
    found: dict[Cell, dict[int, Sequence[Point]]] = {}
    for cell in cells:
        for seed in seeds:
            run = cell.run(seed, runs)
            folder = RunFolder(run.folder)
            if not folder.summary.exists():
                continue
            if _placeless(load_run_config(folder.config)) != _placeless(run.config):
                raise ConfigError(f"{run.folder} holds a run of another config; expected {run.label!r}. Remove it.")
            headline = TASKS[run.config.data.task].headline
            found.setdefault(cell, {})[seed] = curve(run.folder, run.config, headline)
    return Findings(size, found)


def _placeless(config: RunConfig) -> RunConfig:
    """The config with the names of its data files alone, so that kept runs can be read in another checkout."""
    names = {"train": Path(config.data.train).name, "test": Path(config.data.test or "").name}
    return config.model_copy(update={"data": config.data.model_copy(update=names)})


def tables(findings: Findings) -> dict[str, str]:
    """Return the Markdown tables by name."""
    size, written = findings.size, {}
    for privacy, word in zip(PRIVACIES, ("plain", "private"), strict=True):
        written[f"{size}-accuracy-{word}"] = _accuracy(findings, privacy)
        written[f"{size}-bytes-{word}"] = _bytes(findings, privacy)
    written[f"{size}-pairs"] = _pairs(findings)
    written[f"{size}-rates"] = _rates(findings)
    return written


def _accuracy(findings: Findings, privacy: str) -> str:
    def cell(federation: str, method: str) -> str:
        return _final(findings, Cell(findings.size, federation, privacy, method))

    return _grid(f"accuracy (%), {privacy}", {}, cell)


def _final(findings: Findings, cell: Cell) -> str:
    found = findings.final(cell)
    return f"{mean_and_half(over_seeds(list(found.values())))} ({len(found)})" if found else NOTHING


def _times(rate: float) -> str:
    return "" if rate == 1 else f", rate x {rate},"


def _rates(findings: Findings) -> str:
    columns = [(federation, method) for federation in RATED_FEDERATIONS for method in RATED_METHODS]
    head = ["accuracy (%), ε = 6", *(f"{federation}, `{method}`" for federation, method in columns)]
    body = [
        [
            f"rate x {rate}",
            *(_final(findings, Cell(findings.size, name, "ε = 6", method, rate)) for name, method in columns),
        ]
        for rate in RATES
    ]
    return markdown([head, *body])


def _bytes(findings: Findings, privacy: str) -> str:
    targets = {federation: findings.target(federation, privacy) for federation in FEDERATIONS}

    def cell(federation: str, method: str) -> str:
        target, own = targets[federation], Cell(findings.size, federation, privacy, method)
        runs = len(findings.curves.get(own, {}))
        if target is None or not runs:
            return NOTHING
        reached = findings.megabytes_to(own, target)
        return f"{mean(reached):.2f} ({len(reached)} of {runs})" if reached else f"not reached (0 of {runs})"

    notes = {name: f"to {target:.1f} %" for name, target in targets.items() if target is not None}
    return _grid(f"MB, {privacy}", notes, cell)


def _grid(corner: str, notes: Mapping[str, str], cell: Callable[[str, str], str]) -> str:
    head = [corner, *(f"{name}, {notes[name]}" if name in notes else name for name in FEDERATIONS)]
    body = [
        [
            f"`{method}`" + (" (personal)" if METHODS[method].personal else ""),
            *(cell(name, method) for name in FEDERATIONS),
        ]
        for method in METHODS
    ]
    return markdown([head, *body])


def _pairs(findings: Findings) -> str:
    body = []
    for privacy, first, rate, second in PAIRS:
        differences = []
        for federation in FEDERATIONS:
            one = findings.final(Cell(findings.size, federation, privacy, first, rate))
            other = findings.final(Cell(findings.size, federation, privacy, second))
            paired = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
            differences.append(f"{signed_interval(over_seeds(paired))} ({len(paired)})" if paired else NOTHING)
        body.append([f"`{first}`{_times(rate)} - `{second}`, {privacy}", *differences])
    return markdown([["points of accuracy, paired by seed", *FEDERATIONS], *body])
