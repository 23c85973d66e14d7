"""Dealing rows to virtual sites by their numbers, whatever the rows themselves are kept in.

What decides is small (a label, a site's name, a person and a digest a row), so that the same deal serves examples in
memory and tokens in a file, and 10,000 sites cost a few bytes a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config.data import DataConfig
from common.data.examples import Example
from common.data.partition import PARTITIONERS, Part
from common.errors import DataError
from common.randomness import numpy_generator

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """What is known of the rows of a part besides their text, in the order of the file.

    Attributes:
        labels: [N] int64, -1 without labels.
        sites: [N] int32, index into ``site_names``; -1 where the row names none.
        site_names: in the order in which they first stood.
        persons: [N] int32, numbered in the order in which they first stood; -1 where the row names none.
        digests: [N, 16] uint8, of what makes two rows the same.
    """

    labels: NDArray[np.int64]
    sites: NDArray[np.int32]
    site_names: tuple[str, ...]
    persons: NDArray[np.int32]
    digests: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


class ColumnsBuilder:
    """Collects columns example by example."""

    def __init__(self) -> None:
        self._labels: list[int] = []
        self._sites: list[int] = []
        self._persons: list[int] = []
        self._digests = bytearray()
        self._site_numbers: dict[str, int] = {}
        self._person_numbers: dict[str, int] = {}

    def add(self, example: Example) -> None:
        """Take the next row."""
        self._labels.append(example.label)
        self._sites.append(_number(example.site, self._site_numbers))
        self._persons.append(_number(example.person, self._person_numbers))
        self._digests += hashlib.blake2b(repr(example.content).encode(), digest_size=16).digest()

    def columns(self) -> Columns:
        """Return the columns of the rows so far."""
        return Columns(
            np.array(self._labels, dtype=np.int64),
            np.array(self._sites, dtype=np.int32),
            tuple(self._site_numbers),
            np.array(self._persons, dtype=np.int32),
            np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 16),
        )


def columns_of(examples: Sequence[Example]) -> Columns:
    """Return the columns of examples."""
    builder = ColumnsBuilder()
    for example in examples:
        builder.add(example)
    return builder.columns()


def _number(name: str | None, numbers: dict[str, int]) -> int:
    return -1 if name is None else numbers.setdefault(name, len(numbers))


class Dealt(Mapping[str, Indices]):
    """The rows of each site, as numbers in the order of the file; sites sorted by name, none without rows.

    Args:
        names: of the sites that rows may be dealt to.
        sites: [N] int64, index into ``names`` for each row.
        rows: [N] int64, numbers of the rows.
    """

    def __init__(self, names: Sequence[str], sites: Indices, rows: Indices) -> None:
        filled: list[int] = np.flatnonzero(np.bincount(sites, minlength=len(names))).tolist()
        self.names = tuple(sorted(names[site] for site in filled))
        ranks = np.full(len(names), -1, dtype=np.int64)
        places = {name: rank for rank, name in enumerate(self.names)}
        for site in filled:
            ranks[site] = places[names[site]]
        order = np.argsort(ranks[sites], kind="stable")
        self.rows = rows[order]
        self.site_of_row = ranks[sites][order]
        self.bounds = np.concatenate([[0], np.cumsum(np.bincount(self.site_of_row, minlength=len(self.names)))])
        self._places = places

    def __getitem__(self, site: str) -> Indices:
        place = self._places[site]
        return self.rows[self.bounds[place] : self.bounds[place + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def kept(self, mask: NDArray[np.bool_]) -> Dealt:
        """Return what is left of ``mask``, [N] in the order of ``rows``."""
        return Dealt(self.names, self.site_of_row[mask], self.rows[mask])

    def chosen(self, choose: Callable[[str, int], Indices]) -> NDArray[np.bool_]:
        """Return a mask over ``rows`` of the places that ``choose(site, number of its rows)`` names, site by site."""
        mask = np.zeros(len(self.rows), dtype=bool)
        for site, start, stop in zip(self.names, self.bounds[:-1], self.bounds[1:], strict=True):
            mask[start + choose(site, int(stop - start))] = True
        return mask


@dataclass(frozen=True)
class Deal:
    """The rows of every site.

    Attributes:
        train: numbers of rows of the train part.
        test: numbers of rows of the test part, or of the train part where the test rows are held out of it.
        shared_with_test: number of test rows that also stand in a training part, word for word.
    """

    train: Dealt
    test: Dealt
    shared_with_test: int


def deal(train: Columns, test: Columns | None, data: DataConfig, seed: int, texts: Callable[[str], list[str]]) -> Deal:
    """Deal the rows of a simulation to its sites.

    Args:
        train: of the train part.
        test: of the test part, where the config names one.
        data: the config section.
        seed: of the run.
        texts: from "train" or "test" to the texts of its rows, for partitioners that look at them.

    Raises:
        DataError: a site column that is missing; a site without training rows.
    """
    parts = [("train", train)] + ([("test", test)] if test is not None else [])
    dealt = _to_sites(parts, data, seed, texts)
    kept, source = dealt[0], train if test is None else test
    held = dealt[1] if test is not None else Dealt((), np.zeros(0, np.int64), np.zeros(0, np.int64))
    if test is None and data.test_fraction > 0:
        out = kept.chosen(lambda site, count: _held_out(site, count, data.test_fraction, seed))
        kept, held = kept.kept(~out), kept.kept(out)
    most = data.max_rows_per_site
    if most is not None:
        kept = kept.kept(kept.chosen(lambda site, count: _choice(site, count, most, seed)))
    if data.max_test_rows is not None and len(held.rows) > data.max_test_rows:
        draw = numpy_generator(seed, "choose-test").choice(len(held.rows), data.max_test_rows, replace=False)
        mask = np.zeros(len(held.rows), dtype=bool)
        mask[draw] = True
        held = held.kept(mask)
    trained, tested = _keys(train.digests[kept.rows]), _keys(source.digests[held.rows])
    return Deal(kept, held, int(np.isin(tested, trained).sum()))


def _to_sites(
    parts: Sequence[tuple[str, Columns]], data: DataConfig, seed: int, texts: Callable[[str], list[str]]
) -> list[Dealt]:
    numbers = [np.arange(len(columns), dtype=np.int64) for _, columns in parts]
    if data.partition.kind == "column":
        for part, columns in parts:
            _expect_sites(columns, data, part)
        return [
            Dealt(columns.site_names, columns.sites.astype(np.int64), rows)
            for (_, columns), rows in zip(parts, numbers, strict=True)
        ]
    asked = [
        Part(part, columns.labels, len(data.labels or ()), lambda part=part: texts(part))  # type: ignore[misc]
        for part, columns in parts
    ]
    assigned = PARTITIONERS[data.partition.kind](asked, data.partition, seed)
    count = data.partition.sites or 1
    width = len(str(count - 1))
    names = [f"site-{index:0{width}d}" for index in range(count)]
    filled = np.bincount(assigned[0], minlength=count)
    empty = np.flatnonzero(filled == 0)
    if len(empty):
        raise DataError(
            f"data.partition leaves {len(empty)} of {count} sites without training rows ({names[empty[0]]}, ...); "
            "expected rows at every site. Use fewer sites, a larger alpha or another seed."
        )
    return [Dealt(names, sites, rows) for sites, rows in zip(assigned, numbers, strict=True)]


def _expect_sites(columns: Columns, data: DataConfig, part: str) -> None:
    nameless = np.flatnonzero(columns.sites < 0)
    if len(nameless):
        raise DataError(
            f"data.{part} row {nameless[0] + 1}: field {data.partition.column!r} is missing; expected the site. "
            "Add it, or choose another data.partition.kind."
        )


def _held_out(site: str, count: int, fraction: float, seed: int) -> Indices:
    order = numpy_generator(seed, "hold-out", site).permutation(count)
    return order[: min(count - 1, round(count * fraction))]


def _choice(site: str, count: int, most: int, seed: int) -> Indices:
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return numpy_generator(seed, "choose-rows", "train", site).choice(count, most, replace=False)


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first half of each digest: enough to tell rows apart, and quick to sort."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()
