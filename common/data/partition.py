"""How rows become virtual sites: one function a kind, seeded, the same label mix for train and test.

Every partitioner gets the labels of the rows (-1 where there are none), draws its proportions from a generator that
does not depend on the rows, and returns the site index of each row. So the train and the test part of a site agree.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.config.data import PartitionConfig
from common.randomness import numpy_generator

Sites = NDArray[np.int64]


def _by_share(rows: Sites, shares: NDArray[np.float64], order: np.random.Generator) -> tuple[Sites, Sites]:
    """Deal ``rows``, shuffled, to sites so that site k gets ``shares[k]`` of them to the nearest row."""
    shuffled = order.permutation(rows)
    bounds = np.rint(np.cumsum(shares) * len(rows)).astype(np.int64)
    return shuffled, np.searchsorted(bounds, np.arange(len(rows)), side="right").astype(np.int64)


def partition_iid(labels: Sites, config: PartitionConfig, seed: int, part: str) -> Sites:
    """Equal parts at random."""
    sites = config.sites or 1
    return _from_shares(labels, np.full(sites, 1.0 / sites), seed, part)


def partition_size(labels: Sites, config: PartitionConfig, seed: int, part: str) -> Sites:
    """Random parts whose sizes are log-normal with standard deviation ``sigma`` of the logarithm."""
    draw = numpy_generator(seed, "partition-size")
    sizes = np.exp(draw.normal(0.0, config.sigma, config.sites or 1))
    return _from_shares(labels, sizes / sizes.sum(), seed, part)


def partition_dirichlet(labels: Sites, config: PartitionConfig, seed: int, part: str) -> Sites:
    """For each label a Dirichlet(alpha) share for every site (Hsu et al. 1909.06335, as in Li et al. 2102.02079)."""
    assigned = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        sites = config.sites or 1
        shares = numpy_generator(seed, "partition-dirichlet", int(label)).dirichlet([config.alpha] * sites)
        order = numpy_generator(seed, "partition-order", part, int(label))
        rows, site = _by_share(np.flatnonzero(labels == label), shares, order)
        assigned[rows] = site
    return assigned


def _from_shares(labels: Sites, shares: NDArray[np.float64], seed: int, part: str) -> Sites:
    assigned = np.zeros(len(labels), dtype=np.int64)
    rows, site = _by_share(
        np.arange(len(labels), dtype=np.int64),
        shares,
        numpy_generator(seed, "partition-order", part),
    )
    assigned[rows] = site
    return assigned


PARTITIONERS: dict[str, Callable[[Sites, PartitionConfig, int, str], Sites]] = {
    "iid": partition_iid,
    "size": partition_size,
    "dirichlet": partition_dirichlet,
}
