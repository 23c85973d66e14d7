"""One site: its name, its tokenised rows and its randomness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from common.config.run import RunConfig
from common.data.batches import TokenRow
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
    """

    name: str
    rows: tuple[TokenRow, ...]
    lengths: tuple[int, ...]
    randomness: PrivateRandomness


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
    return Site(name, tuple(rows), tuple(map(len, rows)), KeyedRandomness(config.seed, name))
