"""The data of a simulated federation: every site's training rows and test rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common.config.data import DataConfig
from common.data.examples import Example
from common.data.partition import PARTITIONERS
from common.data.readers import read_examples
from common.errors import DataError
from common.randomness import numpy_generator

Rows = tuple[Example, ...]


@dataclass(frozen=True)
class FederatedData:
    """Rows by site; sites in the order of their names.

    Attributes:
        train: training rows of each site.
        test: test rows of each site; empty where there is no test part. A site of the test part that has no
            training rows is kept: it is evaluated, not trained.
        shared_with_test: number of test rows that also stand in a training part, word for word.
    """

    train: dict[str, Rows]
    test: dict[str, Rows]
    shared_with_test: int = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that train, sorted."""
        return tuple(self.train)


@lru_cache(maxsize=2)
def load_federated_data(data: DataConfig, seed: int) -> FederatedData:
    """Read the train and test parts and deal them to sites. Cached: every virtual site of a process shares it.

    Raises:
        DataError: as the readers do; a site column that is missing; a site without training rows.
    """
    train = _to_sites(read_examples(data.train, data, "data.train"), data, seed, "train")
    test: dict[str, list[Example]] = {}
    if data.test is not None:
        test = _to_sites(read_examples(data.test, data, "data.test"), data, seed, "test")
    elif data.test_fraction > 0:
        train, test = _hold_out(train, data.test_fraction, seed)
    if data.max_rows_per_site is not None:
        train = {site: _choose(rows, data.max_rows_per_site, seed, "train", site) for site, rows in train.items()}
    if data.max_test_rows is not None:
        test = _cap_test(test, data.max_test_rows, seed)
    seen = {example.content for rows in train.values() for example in rows}
    shared = sum(example.content in seen for rows in test.values() for example in rows)
    return FederatedData(_frozen(train), _frozen(test), shared)


def _frozen(parts: dict[str, list[Example]]) -> dict[str, Rows]:
    return {site: tuple(parts[site]) for site in sorted(parts) if parts[site]}


def _to_sites(examples: list[Example], data: DataConfig, seed: int, part: str) -> dict[str, list[Example]]:
    sites: dict[str, list[Example]] = {}
    if data.partition.kind == "column":
        for number, example in enumerate(examples, start=1):
            if example.site is None:
                raise DataError(
                    f"data.{part} row {number}: field {data.partition.column!r} is missing; expected the site. "
                    "Add it, or choose another data.partition.kind."
                )
            sites.setdefault(example.site, []).append(example)
        return sites
    labels = np.array([example.label for example in examples], dtype=np.int64)
    assigned = PARTITIONERS[data.partition.kind](labels, data.partition, seed, part)
    count = data.partition.sites or 1
    width = len(str(count - 1))
    sites = {f"site-{index:0{width}d}": [] for index in range(count)}
    names = list(sites)
    for example, index in zip(examples, assigned, strict=True):
        sites[names[int(index)]].append(example)
    empty = [site for site, rows in sites.items() if not rows]
    if empty and part == "train":
        raise DataError(
            f"data.partition leaves {len(empty)} of {count} sites without training rows ({empty[0]}, ...); "
            "expected rows at every site. Use fewer sites, a larger alpha or another seed."
        )
    return sites


def _hold_out(
    train: dict[str, list[Example]], fraction: float, seed: int
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    kept, held = {}, {}
    for site, rows in train.items():
        order = numpy_generator(seed, "hold-out", site).permutation(len(rows))
        cut = min(len(rows) - 1, round(len(rows) * fraction))
        held[site] = [rows[i] for i in sorted(order[:cut])]
        kept[site] = [rows[i] for i in sorted(order[cut:])]
    return kept, held


def _choose(rows: list[Example], most: int, seed: int, part: str, site: str) -> list[Example]:
    if len(rows) <= most:
        return rows
    chosen = numpy_generator(seed, "choose-rows", part, site).choice(len(rows), most, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _cap_test(test: dict[str, list[Example]], most: int, seed: int) -> dict[str, list[Example]]:
    flat = [(site, i) for site in sorted(test) for i in range(len(test[site]))]
    if len(flat) <= most:
        return test
    chosen = sorted(numpy_generator(seed, "choose-test").choice(len(flat), most, replace=False))
    capped: dict[str, list[Example]] = {}
    for index in chosen:
        site, row = flat[int(index)]
        capped.setdefault(site, []).append(test[site][row])
    return capped
