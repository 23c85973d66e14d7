"""How many virtual sites are trained in one pass by default, as many as were measured to be faster, and which.

A step's rows and a pass's tokens say whether there is anything to gain: a site whose own steps fill a pass gains
nothing from company. ``python -m simulations.benchmarks.cohort`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.config.run import RunConfig
from common.models.base import choose_device
from simulations.engines.sharing import Cut

AUTO = {"cpu": (8, 1024), "cuda": (32, 16384)}
"""By type of device: how many sites, and the tokens of a whole step, at ``data.max_length``, up to which they are."""

BATCHES = {"cpu": 4}
"""By type of device: what the number of a round's passes is a multiple of, so that up to so many workers end together.
GPUs gain more from large passes."""


def cohort_size(asked: int | None, config: RunConfig, device: str = "auto") -> int:
    """Return how many sites are trained in one pass; it follows from its arguments alone.

    Args:
        asked: by ``--cohort``; None for auto.
        config: the run config. One by one go, with auto, whatever can only be trained so, large steps, and runs whose
            micro-batches are limited to a number of rows.
        device: to compute on.
    """
    if asked is not None:
        return asked
    training, adapter = config.training, config.adapter
    if adapter.kind != "lora" or adapter.dropout > 0 or training.micro_batch_size != "auto":
        return 1
    sites, tokens = AUTO.get(choose_device(device).type, (1, 0))
    return sites if training.batch_size * config.data.max_length <= tokens else 1


def cohort_cut(most: int, config: RunConfig, device: str = "auto", rows: Sequence[int] = ()) -> Cut:
    """Return how a round's sites are dealt to joint passes; it follows from its arguments alone.

    Args:
        most: most sites in one.
        config: the run config.
        device: to compute on.
        rows: of each site, by the number of its node; empty where they are not known.
    """
    training = config.training
    work = [float(own) for own in rows]
    if training.local_steps is not None:
        work = [min(own, float(training.batch_size)) for own in work]
    return Cut(most, BATCHES.get(choose_device(device).type, 1), work)
