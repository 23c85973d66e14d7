"""Entry point of ``make bench``: prints one table and writes ``bench.json``, one record a line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from common.quiet import quiet_dependencies

quiet_dependencies()

from common.errors import FedtuneError  # noqa: E402
from simulations.benchmarks.lines import (  # noqa: E402
    as_json,
    lines_of_before,
    markdown_table,
    terminal_table,
    wide_console,
)
from simulations.benchmarks.page import write_between  # noqa: E402
from simulations.benchmarks.parts import PARTS  # noqa: E402
from simulations.benchmarks.works import QUICK, ROOT, Extent  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Part, can be repeated: {', '.join(PARTS)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows, sites and rounds: an impression.")] = False,
    rows: Annotated[int | None, typer.Option(min=8, help="Most rows of a real site.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of (a) and (c).")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Turns of whole runs; of Flower's one.")] = None,
    workers: Annotated[int, typer.Option(min=2, help="Processes, where there are several.")] = 2,
    out: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("bench.json"),
    write_docs: Annotated[bool, typer.Option("--write-docs", help="Write the table into docs/benchmarks.md.")] = False,
) -> None:
    """Measure, and print one table. Parts measured before to the same extent stand in it as they were."""
    import torch

    for part in only or ():
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r}; expected one of {', '.join(PARTS)}.", param_hint="--only")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of worker processes
    given: dict[str, Any] = {"rows": rows, "rounds": rounds, "pairs": pairs, "workers": workers}
    extent = replace(QUICK if quick else Extent(), **{key: value for key, value in given.items() if value is not None})
    console = wide_console()
    try:
        found = lines_of_before(out, extent.text())
        for part in only or PARTS:
            found = [line for line in found if line.part != part]
            for line in PARTS[part](extent):
                console.print(f"{line.name}: {line.ours if line.ratio is None else line.ratio:.3g}", highlight=False)
                found.append(line)
            lines = [line for name in PARTS for line in found if line.part == name]
            out.write_text(as_json(lines, extent.text()), encoding="utf-8")
        console.print(terminal_table(lines, extent.text()))
        if write_docs:
            write_between(PAGE, "bench", f"{extent.text()}.\n\n{markdown_table(lines)}")
    except FedtuneError as error:
        console.print(f"error: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
