"""A page: headings, sentences, tables and pictures in one HTML file that needs nothing else.

Everything is escaped: names of sites come from data. Pictures are SVG inside ``<img>`` data URIs, where a browser runs
no script, and a content security policy forbids the page to load anything.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

import jinja2

from simulations.study.style import Picture


@dataclass(frozen=True)
class Rows:
    """A table of a page.

    Attributes:
        head: the columns; the first is text, the others are numbers, to the right.
        body: rows of cells.
        last_is_total: whether the last row is set apart.
        text_columns: further columns that are text, by index.
    """

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    last_is_total: bool = False
    text_columns: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Part:
    """A section of a page.

    Attributes:
        title: its heading.
        sentences: paragraphs.
        tables: its tables.
        pictures: its pictures.
        listing: text set as it is, such as YAML; folded away.
    """

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    pictures: Sequence[Picture] = ()
    listing: str | None = None


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: its heading.
        lead: what it says, in a sentence or two.
        facts: figures shown large, as (what, figure).
        parts: its sections.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    parts: Sequence[Part] = field(default_factory=tuple)


def render(page: Page) -> str:
    """Return the page as HTML."""
    return _environment().get_template("page.html.j2").render(page=page)


def data_uri(picture: Picture) -> str:
    """Return a picture as a data URI."""
    return f"data:image/svg+xml;base64,{b64encode(picture.svg).decode()}"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    source = (files("simulations.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page.html.j2": source}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment
