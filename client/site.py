"""One site: its name, its tokenised rows and its randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from common.config.run import RunConfig
from common.data.batches import TokenRow
from common.data.examples import Example
from common.data.federated import load_federated_data
from common.errors import ConfigError
from common.models.adapter import AdaptedModel
from common.randomness import KeyedRandomness, PrivateRandomness
from common.tasks.catalog import TASKS


@dataclass(frozen=True)
class Site:
    """A data holder.

    Attributes:
        name: unique in the federation.
        rows: training rows, tokenised once.
        lengths: tokens of each row.
        randomness: where noise and sampling come from.
        persons: the person of each row, numbered from 0; None where rows name no person.
    """

    name: str
    rows: tuple[TokenRow, ...]
    lengths: tuple[int, ...]
    randomness: PrivateRandomness
    persons: tuple[int, ...] | None = None

    def num_units(self, unit: str) -> int:
        """Return the number of what a privacy unit protects here: persons for "user", else rows."""
        return len(self._rows_by_person) if unit == "user" else len(self.rows)

    def rows_of_persons(self, persons: Sequence[int]) -> list[int]:
        """Return the rows of some persons."""
        return [row for person in persons for row in self._rows_by_person[person]]

    @cached_property
    def _rows_by_person(self) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in set(self.persons or ())]
        for row, person in enumerate(self.persons or ()):
            rows[person].append(row)
        return rows


def virtual_site(config: RunConfig, node_config: Mapping[str, object], model: AdaptedModel) -> Site:
    """Return the virtual site that a simulated node stands for.

    Args:
        config: the run config, whose data section describes all virtual sites.
        node_config: Flower's node config, with ``partition-id`` and ``num-partitions``.
        model: the resident model, for its tokenizer.

    Raises:
        ConfigError: for a node that is no simulated one, or for more or fewer nodes than sites.
    """
    number, count = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(number, int) or not isinstance(count, int):
        raise ConfigError(
            "this node has no partition-id, so it is not simulated; expected Flower's simulation or fedtune-sim."
        )
    sites = load_federated_data(config.data, config.seed).sites
    if count != len(sites) or not 0 <= number < count:
        raise ConfigError(
            f"the simulation has {count} nodes but the data has {len(sites)} sites; expected as many. "
            f"Set the number of supernodes to {len(sites)}."
        )
    return _tokenised(config, sites[number], model)


@lru_cache(maxsize=4096)
def _tokenised(config: RunConfig, name: str, model: AdaptedModel) -> Site:
    examples = load_federated_data(config.data, config.seed).train[name]
    rows = TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)
    randomness = KeyedRandomness(config.seed, name)
    return Site(name, tuple(rows), tuple(map(len, rows)), randomness, _persons(examples))


def _persons(examples: Sequence[Example]) -> tuple[int, ...] | None:
    """Number the persons in order of their first row; None where rows name no person."""
    if any(example.person is None for example in examples):
        return None
    numbers: dict[str | None, int] = {}
    return tuple(numbers.setdefault(example.person, len(numbers)) for example in examples)
