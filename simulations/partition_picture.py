"""The picture of a partition: which site has how much of what, for a handful of sites or for hundreds.

A bubble's area is a number of rows and so is a bar's length: what is twice as much looks twice as much. Beyond forty
sites the rows of a label become a heat map, each site's mix a column of it. Sites stand by size, the largest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.atomic import write_atomic
from common.config.run import RunConfig
from common.data.tokens import FederatedTokens, SiteTokens

MOST_BUBBLES = 40
"""Sites that are drawn as bubbles with their names."""

MOST_COLUMNS = 1000
"""Sites that have a column of their own in the heat map; of more, neighbours in size share one."""

MOST_NAMED_LABELS = 40

_BLUE, _PALE, _INK, _GREY, _LINE = "#0b5cad", "#c4470c", "#1f2937", "#6b7280", "#e5e7eb"


@dataclass(frozen=True)
class Partition:
    """Rows of each site by label.

    Attributes:
        sites: names, largest first.
        labels: names, in the order of the config; one, "rows", where there are none.
        train: [S, L], training rows.
        test: [S], test rows.
    """

    sites: tuple[str, ...]
    labels: tuple[str, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def partition_of(config: RunConfig, data: FederatedTokens) -> Partition:
    """Count the rows of every site by label."""
    labels = tuple(map(str, config.data.labels or ("rows",)))
    train = np.array([_counts(data.train, site, len(labels)) for site in data.sites])
    test = np.array([len(data.test[site]) if site in data.test else 0 for site in data.sites])
    order = np.lexsort((train.argmax(axis=1), -train.sum(axis=1)))
    return Partition(tuple(data.sites[site] for site in order), labels, train[order], test[order])


def _counts(rows: SiteTokens, site: str, labels: int) -> NDArray[np.int64]:
    return np.bincount(np.maximum(rows[site].labels, 0), minlength=labels)


def draw_partition(path: Path, config: RunConfig, data: FederatedTokens) -> None:
    """Draw the partition of a run as PNG.

    Args:
        path: the file.
        config: the run config.
        data: every site's rows.
    """
    partition = partition_of(config, data)
    figure = _bubbles(partition) if len(partition.sites) <= MOST_BUBBLES else _heat_map(partition)
    figure.suptitle(_title(config, partition), fontsize=11, fontweight="bold", color=_INK)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_atomic(path, content.getvalue())


def _title(config: RunConfig, partition: Partition) -> str:
    kind = config.data.partition
    drawn = {
        "column": f"sites by column {kind.column!r}",
        "iid": "IID",
        "dirichlet": f"Dirichlet, α = {kind.alpha:g}",
        "pathological": f"{kind.labels_per_site} labels a site",
        "size": f"log-normal sizes, σ = {kind.sigma:g}",
        "cluster": "clusters of texts",
        "flower": f"flwr-datasets {kind.partitioner}",
    }[kind.kind]
    total, skew = partition.train.sum(), _skew(partition)
    by_label = f", label skew {skew:.2f}" if len(partition.labels) > 1 else ""
    return f"{config.name}: {len(partition.sites):,} sites, {total:,} training rows, {drawn}{by_label}"


def _skew(partition: Partition) -> float:
    """Mean total variation distance, in [0, 1], of the sites' label mixes from that of all rows, weighted by rows."""
    sizes = partition.train.sum(axis=1, keepdims=True)
    mixes, whole = partition.train / sizes, partition.train.sum(axis=0) / sizes.sum()
    return float(np.average(np.abs(mixes - whole).sum(axis=1) / 2, weights=sizes[:, 0]))


def _bubbles(partition: Partition) -> Figure:
    sites, labels = partition.train.shape
    names = max(map(len, partition.labels))
    width = min(15.0, max(6.4, 3.2 + 0.42 * labels + 1.9))
    figure = Figure(figsize=(width, 1.5 + 0.3 * sites + min(0.075 * names, 1.9)), dpi=150, layout="constrained")
    mixes, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(max(3.0, 0.42 * labels), 1.9))
    across, down = np.meshgrid(np.arange(labels), np.arange(sites))
    step = min(24.0, 0.9 * 72 * (width - 4.5) / labels)
    largest = partition.train.max()
    mixes.scatter(across, down, s=step**2 * partition.train / largest, color=_BLUE, alpha=0.85, linewidths=0)
    mixes.set(xlim=(-0.6, labels - 0.4), ylim=(sites - 0.4, -0.6), xticks=range(labels), yticks=range(sites))
    turn = 40 if labels <= 20 else 90
    mixes.set_xticklabels(_shortened(partition.labels), rotation=turn, ha="right", va="center" if turn == 90 else "top",
                          rotation_mode="anchor")  # fmt: skip
    mixes.set_yticklabels(_shortened(partition.sites))
    mixes.set_title(f"training rows by label; largest bubble {largest:,}", fontsize=9, color=_GREY)
    _size_bars(sizes, partition, figure.get_figheight())
    for axes in (mixes, sizes):
        axes.tick_params(labelsize=8 if labels <= 30 else 6, length=0, colors=_INK)
        axes.grid(visible=True, color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    sizes.tick_params(labelleft=False)
    return figure


def _size_bars(axes: Axes, partition: Partition, inches: float) -> None:
    places, train = np.arange(len(partition.sites)), partition.train.sum(axis=1)
    axes.barh(places - 0.17, train, height=0.34, color=_BLUE, label="train")
    if partition.test.any():
        axes.barh(places + 0.17, partition.test, height=0.34, color=_PALE, label="test")
    for place, count in zip(places, train, strict=True):
        axes.annotate(f"{count:,}", (count, place - 0.17), (3, 0), textcoords="offset points", va="center", fontsize=7,
                      color=_INK)  # fmt: skip
    axes.set_xlim(0, 1.2 * max(train.max(), partition.test.max()))
    axes.set_title("rows", fontsize=9, color=_GREY)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.02 - 0.28 / inches), ncols=2,
                frameon=False)  # fmt: skip


def _heat_map(partition: Partition) -> Figure:
    labels = len(partition.labels)
    shares = partition.train / partition.train.sum(axis=1, keepdims=True)
    columns = min(len(partition.sites), MOST_COLUMNS)
    groups = np.array_split(np.arange(len(partition.sites)), columns)
    mixes = np.stack([shares[group].mean(axis=0) for group in groups], axis=1)
    figure = Figure(figsize=(9.6, 3.0 + max(1.2, min(0.24 * labels, 7.5))), dpi=150, layout="constrained")
    sizes, heat = figure.subplots(2, 1, height_ratios=(1.4, max(1.2, min(0.24 * labels, 7.5))), sharex=True)
    edges = np.array([0, *(group[-1] + 1 for group in groups)])
    sizes.stairs([partition.train[group].sum(axis=1).mean() for group in groups], edges, fill=True, color=_BLUE,
                 label="train")  # fmt: skip
    if partition.test.any():
        sizes.stairs([partition.test[group].mean() for group in groups], edges, fill=True, color=_PALE, label="test")
    sizes.set(ylabel="rows of a site", xlim=(0, len(partition.sites)))
    sizes.set_ylim(bottom=0)
    sizes.legend(fontsize=8, framealpha=0.9)
    sizes.grid(visible=True, axis="y", color=_LINE, linewidth=0.6)
    sizes.set_axisbelow(True)
    shown = heat.pcolormesh(edges, np.arange(labels + 1), mixes, cmap="Blues", vmin=0, vmax=max(mixes.max(), 1e-9))
    heat.set(xlabel="sites, largest first", ylim=(labels, 0))
    if labels <= MOST_NAMED_LABELS:
        heat.set_yticks(np.arange(labels) + 0.5, _shortened(partition.labels))
    else:
        heat.set(ylabel=f"{labels} labels, in the order of the config", yticks=[])
    heat.tick_params(labelsize=8, length=0, colors=_INK)
    bar = figure.colorbar(shown, ax=heat, pad=0.01, format=lambda value, _: f"{100 * value:.0f} %")
    bar.set_label("share of a site's rows", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    for axes in (sizes, heat):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _shortened(names: tuple[str, ...]) -> list[str]:
    return [name if len(name) <= 28 else f"{name[:26]}…" for name in names]
