"""Tables between the markers of a page of ``docs/``, replaced by what a script writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.console import error_console
from common.errors import ConfigError
from simulations.study.shown import NOTHING


def write_tables(page: Path, tables: Mapping[str, str], command: str) -> None:
    """Replace what stands between the markers of each table in a page, unless one would lose results that it has.

    Then the page is left as it is, which is told on standard error: the runs behind it are elsewhere, or were not asked
    for.

    Args:
        page: the page; holds ``<!-- NAME: written by COMMAND -->`` and ``<!-- end of NAME -->`` once for each table.
        tables: Markdown by name.
        command: what writes them.

    Raises:
        ConfigError: if a table has no markers there.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        begin, end = f"<!-- {name}: written by {command} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ConfigError(f"{page} lacks the markers of table {name!r}; expected {begin!r} and {end!r} once.")
        before, _, rest = text.partition(begin)
        kept, _, after = rest.partition(end)
        lost = _results(kept) - _results(content)
        if lost > 0:
            error_console().print(
                f"{page} is left as it is: {lost} of the {_results(kept)} results in its table {name!r} have no run "
                "here. Make those first; or empty the table by hand, and it is written whatever it had.",
                markup=False,
            )
            return
        text = f"{before}{begin}\n{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def _results(table: str) -> int:
    """Return the number of cells of a table's body that hold something."""
    rows = [line.strip().strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return sum(cell.strip(" *") not in ("", NOTHING) for row in rows for cell in row)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])
