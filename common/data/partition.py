"""How rows become virtual sites: one function a kind, seeded, the same label mix for train and test.

Every partitioner gets the train part and, where there is one, the test part, and returns the site of each row. It draws
its proportions from generators that do not depend on the rows, or works them out on the train part alone, so that the
train and the test part of a site agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config.data import PartitionConfig
from common.data.clusters import cluster_texts
from common.data.flower_partitioners import flower_partition
from common.randomness import numpy_generator

Sites = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """The rows of a part, as far as partitioners look at them.

    Attributes:
        name: "train" or "test".
        labels: [N] int64, -1 where there are none.
        num_labels: size of the label set; 0 where there is none.
        texts: gives the texts of the rows, in order.
    """

    name: str
    labels: Sites
    num_labels: int
    texts: Callable[[], list[str]]


Partitioner = Callable[[Sequence[Part], PartitionConfig, int], list[Sites]]


def _by_share(rows: Sites, shares: Shares, order: np.random.Generator) -> tuple[Sites, Sites]:
    """Deal ``rows``, shuffled, to sites so that site k gets ``shares[k]`` of them to the nearest row."""
    shuffled = order.permutation(rows)
    bounds = np.rint(np.cumsum(shares) * len(rows)).astype(np.int64)
    site = np.searchsorted(bounds, np.arange(len(rows)), side="right")
    return shuffled, np.minimum(site, len(shares) - 1).astype(np.int64)


def partition_iid(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """Equal parts at random."""
    sites = config.sites or 1
    return _from_shares(parts, np.full(sites, 1.0 / sites), seed)


def partition_size(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """Random parts whose sizes are log-normal with standard deviation ``sigma`` of the logarithm."""
    draw = numpy_generator(seed, "partition-size")
    sizes = np.exp(draw.normal(0.0, config.sigma, config.sites or 1))
    return _from_shares(parts, sizes / sizes.sum(), seed)


def partition_dirichlet(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """For each label a Dirichlet(alpha) share for every site (Hsu et al. 1909.06335, as in Li et al. 2102.02079)."""
    sites = config.sites or 1

    def shares(label: int) -> Shares:
        drawn: Shares = numpy_generator(seed, "partition-dirichlet", label).dirichlet([config.alpha] * sites)
        return drawn

    return _from_label_shares(parts, shares, seed)


def partition_pathological(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """``labels_per_site`` labels at each site, the rows of a label in equal parts to the sites that have it.

    McMahan et al. (1602.05629, section 3) cut the rows, sorted by label, into shards and give each site two; a shard
    that spans two labels gives a site a third. Here labels are given instead (Li et al. 2102.02079, "#C = k"), so that
    each site has exactly k and the test part the same ones.
    """
    owners = label_owners(parts[0].num_labels, config, seed)
    return _from_label_shares(parts, lambda label: owners[label] / owners[label].sum(), seed)


def label_owners(num_labels: int, config: PartitionConfig, seed: int) -> Shares:
    """Return which site has which label, [num_labels, sites] of 0 and 1.

    Sites choose in random order among the labels that fewest sites have so far: each has ``labels_per_site``, and two
    labels differ by at most one site.
    """
    sites = config.sites or 1
    draw = numpy_generator(seed, "partition-pathological")
    owners = np.zeros((num_labels, sites))
    taken = np.zeros(num_labels)
    for site in draw.permutation(sites):
        chosen = np.lexsort((draw.random(num_labels), taken))[: config.labels_per_site]
        owners[chosen, site] = 1.0
        taken[chosen] += 1
    return owners


def partition_cluster(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """Texts that are alike, by k-means; the test part goes to the centres of the train part."""
    return cluster_texts([part.texts() for part in parts], config.sites or 1, config.encoder, seed)


def partition_flower(parts: Sequence[Part], config: PartitionConfig, seed: int) -> list[Sites]:
    """A partitioner of flwr-datasets on the train part; test rows go where the train rows of their label went."""
    sites = config.sites or 1
    train = flower_partition(parts[0].labels, config, seed)

    def shares(label: int) -> Shares:
        counts = np.bincount(train[parts[0].labels == label], minlength=sites).astype(np.float64)
        shared = counts if counts.any() else np.ones(sites)
        return np.asarray(shared / shared.sum(), dtype=np.float64)

    return [train, *_from_label_shares(parts[1:], shares, seed)]


def _from_shares(parts: Sequence[Part], shares: Shares, seed: int) -> list[Sites]:
    found = []
    for part in parts:
        assigned = np.zeros(len(part.labels), dtype=np.int64)
        order = numpy_generator(seed, "partition-order", part.name)
        rows, site = _by_share(np.arange(len(part.labels), dtype=np.int64), shares, order)
        assigned[rows] = site
        found.append(assigned)
    return found


def _from_label_shares(parts: Sequence[Part], shares: Callable[[int], Shares], seed: int) -> list[Sites]:
    found = []
    for part in parts:
        assigned = np.zeros(len(part.labels), dtype=np.int64)
        for label in map(int, np.unique(part.labels)):
            order = numpy_generator(seed, "partition-order", part.name, label)
            rows, site = _by_share(np.flatnonzero(part.labels == label), shares(label), order)
            assigned[rows] = site
        found.append(assigned)
    return found


PARTITIONERS: dict[str, Partitioner] = {
    "iid": partition_iid,
    "size": partition_size,
    "dirichlet": partition_dirichlet,
    "pathological": partition_pathological,
    "cluster": partition_cluster,
    "flower": partition_flower,
}
