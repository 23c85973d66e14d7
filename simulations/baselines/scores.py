"""What every test row adds to the metrics under a trained adapter, kept in a file, so that rows can be paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.atomic import write_atomic
from common.config.run import RunConfig
from common.errors import ConfigError
from common.tasks.catalog import TASKS
from common.tasks.task import Metrics

_SUMS, _DIGEST = "sums", "config_digest"


@dataclass(frozen=True)
class Measure:
    """How a task's rows are compared.

    Attributes:
        sum_name: the sum that is compared.
        weight: the sum that it is divided by.
        sign: +1 where more is better.
        binary: whether a row's value is 0 or 1.
        unit: of a difference, for people.
        factor: from the values to that unit.
    """

    sum_name: str
    weight: str
    sign: float
    binary: bool
    unit: str
    factor: float


MEASURES: dict[str, Measure] = {
    "classification": Measure("correct", "rows", 1.0, True, "points of accuracy", 100.0),
    "causal_lm": Measure("loss", "tokens", -1.0, False, "nats a token less", 1.0),
}


@dataclass(frozen=True)
class Scores:
    """The sums of every test row under one adapter.

    Attributes:
        task: name of the task.
        sums: [N, K], K as the task's ``sum_names``.
        owners: the site of every row.
    """

    task: str
    sums: NDArray[np.float64]
    owners: tuple[str, ...]

    def rows_of(self, site: str | None) -> NDArray[np.bool_]:
        """Return which rows are a site's; all for None."""
        return np.array([site is None or owner == site for owner in self.owners], dtype=bool)

    def metrics(self, site: str | None = None) -> Metrics | None:
        """Return the metrics over a site's rows, or over all; None where there are none."""
        chosen = self.sums[self.rows_of(site)]
        if not len(chosen):
            return None
        task = TASKS[self.task]
        return task.metrics(dict(zip(task.sum_names, chosen.sum(axis=0).tolist(), strict=True)))

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one of the sums: [N]."""
        values: NDArray[np.float64] = self.sums[:, TASKS[self.task].sum_names.index(name)]
        return values


def each_at_home(scores: Mapping[str, Scores]) -> Scores:
    """Return the scores of every row under its own site's adapter; sites without one keep no rows.

    Args:
        scores: of each site's adapter on all rows.
    """
    first = next(iter(scores.values()))
    kept = [index for index, owner in enumerate(first.owners) if owner in scores]
    sums = np.array([scores[first.owners[index]].sums[index] for index in kept]).reshape(len(kept), -1)
    return Scores(first.task, sums, tuple(first.owners[index] for index in kept))


def save_scores(path: Path, sums: Tensor, config: RunConfig) -> None:
    """Write the sums of every test row; no text of a row is in them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({_SUMS: sums.contiguous()}, metadata={_DIGEST: config.digest()}))


def load_scores(path: Path, config: RunConfig, owners: Sequence[str]) -> Scores:
    """Read what :func:`save_scores` wrote.

    Raises:
        ConfigError: if the file is not readable, or of another config or other rows.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            digest, sums = file.metadata()[_DIGEST], file.get_tensor(_SUMS)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); expected scores. Remove it.") from None
    if digest != config.digest() or len(sums) != len(owners):
        raise ConfigError(f"{path} is of another config or other test rows; expected these. Choose another --out.")
    return Scores(config.data.task, sums, tuple(owners))
