"""Partitioners of flwr-datasets, where that package is installed.

It is not in an extra: release 0.6.1 asks for datasets below 5, fedtune's ``hub`` extra for 5.2, with which it works.
Beside it, it is installed with ``pip install --no-deps flwr-datasets seaborn``, as ``make test`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.data import PartitionConfig
from common.errors import ConfigError, DataError
from common.randomness import stream_seed

_LABEL, _ROW = "label", "row"

FLOWER_PARTITIONERS: dict[str, tuple[str, Callable[[PartitionConfig, int], dict[str, Any]]]] = {
    "dirichlet": (
        "DirichletPartitioner",
        lambda config, seed: {
            "partition_by": _LABEL, "alpha": config.alpha, "min_partition_size": 1, "seed": seed,
        },
    ),
    "pathological": (
        "PathologicalPartitioner",
        lambda config, seed: {
            "partition_by": _LABEL, "num_classes_per_partition": config.labels_per_site, "seed": seed,
        },
    ),
    "shard": (
        "ShardPartitioner",
        lambda config, seed: {
            "partition_by": _LABEL, "num_shards_per_partition": config.shards_per_site, "seed": seed,
        },
    ),
    "linear": ("LinearPartitioner", lambda config, seed: {}),
    "square": ("SquarePartitioner", lambda config, seed: {}),
    "exponential": ("ExponentialPartitioner", lambda config, seed: {}),
}  # fmt: skip
"""The class of each and what it is made with besides the number of partitions."""


def flower_partition(labels: NDArray[np.int64], config: PartitionConfig, seed: int) -> NDArray[np.int64]:
    """Return the site of each row, as the partitioner deals it.

    Args:
        labels: [N].
        config: names the partitioner.
        seed: of the run.

    Raises:
        ConfigError: if flwr-datasets is not installed.
        DataError: if the partitioner refuses the labels, or leaves rows out.
    """
    try:
        import datasets
        from flwr_datasets import partitioner as offered
    except ImportError as error:
        raise ConfigError(
            f"data.partition.kind is 'flower' but {error.name or 'flwr_datasets'} is not installed; expected "
            "flwr-datasets. Run: pip install -e '.[hub,plots]' and pip install --no-deps flwr-datasets seaborn."
        ) from None
    sites = config.sites or 1
    name, arguments = FLOWER_PARTITIONERS[config.partitioner or ""]
    drawn = stream_seed(seed, "partition-flower") % 2**32
    assigned = np.full(len(labels), -1, dtype=np.int64)
    try:
        dealing = getattr(offered, name)(num_partitions=sites, **arguments(config, drawn))
        dealing.dataset = datasets.Dataset.from_dict({_LABEL: labels, _ROW: np.arange(len(labels))})
        for site in range(sites):
            assigned[np.asarray(dealing.load_partition(site)[_ROW], dtype=np.int64)] = site
    except (ValueError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.partition: flwr-datasets' {name} refuses {len(labels)} rows for {sites} sites ({first[:160]}); "
            "expected rows it can deal. Change sites or its keys."
        ) from None
    if (assigned < 0).any():
        raise DataError(
            f"data.partition: flwr-datasets' {name} leaves {(assigned < 0).sum()} rows out; expected all dealt. "
            "Change sites or its keys."
        )
    return assigned
