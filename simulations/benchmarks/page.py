"""The part of ``docs/benchmarks.md`` that the benchmarks write."""

from __future__ import annotations

from pathlib import Path

from common.errors import RunError


def write_between(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers of ``name``.

    Raises:
        RunError: if the page does not have each marker once.
    """
    begin, end = f"<!-- {name}: written by make {name} -->", f"<!-- end of {name} -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise RunError(f"{page} lacks the markers of {name!r}; expected {begin!r} and {end!r} once each.")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")
