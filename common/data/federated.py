"""The data of a simulated federation as examples: every site's training rows and test rows.

What looks at texts uses it (audit, partition by text). Training and evaluation take the same rows as tokens from
:mod:`common.data.tokens`, which holds no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.config.data import DataConfig
from common.data.dealing import Dealt, columns_of, deal
from common.data.examples import Example
from common.data.readers import read_examples

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
    """Read the train and test parts and deal them to sites. Cached: whoever asks in a process shares it.

    Raises:
        DataError: as the readers do; a site column that is missing; a site without training rows.
    """
    train = read_examples(data.train, data, "data.train")
    test = read_examples(data.test, data, "data.test") if data.test is not None else None
    parts = {"train": train, "test": test or []}
    dealt = deal(
        columns_of(train), None if test is None else columns_of(test), data, seed,
        lambda part: [example.text for example in parts[part]],
    )  # fmt: skip
    return FederatedData(
        _examples(dealt.train, train), _examples(dealt.test, train if test is None else test), dealt.shared_with_test
    )


def _examples(dealt: Dealt, examples: Sequence[Example]) -> dict[str, Rows]:
    return {site: tuple(examples[row] for row in dealt[site]) for site in dealt}
