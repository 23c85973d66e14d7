"""``python -m simulations.local_federation.faults --faults 100 --seed 0``: processes killed at random moments of runs.

One federation without privacy and one with it, each up for all of its faults: coordinator, gateway and two sites as
real processes, with TLS and keys. A run gets several faults, one after the other; a line of JSON tells what became of
each. Faults that have a line already are not repeated, so the script can be stopped and started again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from common.console import one_line_errors
from common.errors import ConfigError, RunError
from common.quiet import quiet_dependencies
from simulations.local_federation.commands import ROOT
from simulations.local_federation.faults.disturbed import disturbed_federation
from simulations.local_federation.faults.kinds import FAULTS
from simulations.local_federation.faults.lines import append_line, read_lines, table
from simulations.local_federation.faults.trial import Trials
from simulations.results.page import write_tables

FEDERATIONS = ("plain", "private")
FAULTS_A_RUN, ROUNDS = 5, 14
MOST_IDLE = 3
"""Runs in a row that may be over before anything was there to be killed."""
PAGE = ROOT / "docs" / "faults.md"
COMMAND = "python -m simulations.local_federation.faults --write-docs"


class Planned(NamedTuple):
    """A fault to come: its number, its kind, and the federation that it befalls."""

    number: int
    kind: str
    federation: str


def plan(faults: int, seed: int) -> list[Planned]:
    """Return what is killed where: every kind in every federation as often, give or take one, in a random order."""
    cells = [(kind, federation) for kind, fault in FAULTS.items() for federation in fault.federations]
    draw = np.random.default_rng([seed])
    chosen: list[tuple[str, str]] = []
    while len(chosen) < faults:
        chosen += [cells[index] for index in draw.permutation(len(cells))]
    return [Planned(number, *cell) for number, cell in enumerate(chosen[:faults])]


def main(
    faults: Annotated[int, typer.Option(min=1, help="How many in all.")] = 100,
    seed: Annotated[int, typer.Option(help="Of kinds, moments and sites.")] = 0,
    only: Annotated[str | None, typer.Option(help="plain or private: faults of that federation alone.")] = None,
    out: Annotated[Path, typer.Option(help="Lines of JSON; what is in it is not repeated.")] = Path(
        "runs/faults.jsonl"
    ),
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Write the table of what is there; kill no more.")
    ] = (False),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Kill processes of a federation at random moments and check what becomes of its runs: exit status 1 for harm."""
    with one_line_errors(debug):
        quiet_dependencies()
        if only is not None and only not in FEDERATIONS:
            raise ConfigError(f"--only is {only!r}; expected one of {', '.join(FEDERATIONS)}.")
        if write_docs:
            lines = read_lines(out)
            if not lines:
                raise RunError(f"{out} has no faults; expected some. Run without --write-docs first.")
            write_tables(PAGE, {"faults": table(lines), "count": f"{len(lines)} faults"}, COMMAND)
            return
        for federation in FEDERATIONS if only is None else (only,):
            known = {line["number"] for line in read_lines(out) if line["seed"] == seed}
            missing = [one for one in plan(faults, seed) if one.federation == federation and one.number not in known]
            if missing:
                _befall(federation, missing, seed, out)
        lines = [line for line in read_lines(out) if line["seed"] == seed]
        _say(table(lines))
        if not all(line["sound"] for line in lines):
            raise RunError(f"{sum(not line['sound'] for line in lines)} faults had consequences; expected none.")


def _befall(federation: str, missing: Sequence[Planned], seed: int, out: Path) -> None:
    left, idle = list(missing), 0
    with disturbed_federation(federation, ROUNDS, _say) as made:
        trials = Trials(made)
        trials.undisturbed()
        _say(f"{federation}: a round takes {trials.round_s:.1f} s")
        while left:
            batch = left[:FAULTS_A_RUN]
            found = trials.run_with([(one.kind, np.random.default_rng([seed, 1, one.number])) for one in batch])
            for one, trial in zip(batch, found, strict=False):  # what the run was too short for, the next one gets
                append_line(out, {"seed": seed, "number": one.number} | trial.line())
                _say(f"{one.number} {one.federation} {one.kind}: {'sound' if trial.sound else trial.line()}")
            left, idle = left[len(found) :], 0 if found else idle + 1
            if idle == MOST_IDLE:
                raise RunError(f"no {batch[0].kind} was there to be killed in {idle} runs; expected one.")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends it, it ends what it started
    typer.run(main)
