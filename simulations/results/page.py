"""Tables between the markers of a page of ``docs/``, replaced by what a script writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import ConfigError


def write_tables(page: Path, tables: Mapping[str, str], command: str) -> None:
    """Replace what stands between the markers of each table in a page.

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
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])
