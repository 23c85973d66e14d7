"""What a task is: three functions over rows and logits, and the metrics they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.config.data import DataConfig
from common.data.batches import Batch, TokenRow
from common.data.examples import Example

Sums = dict[str, float]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A task as plain functions.

    Attributes:
        tokenise: (examples, tokenizer, data) to token rows, in order.
        loss_per_sequence: (logits, batch) to float32 [B]; a function of each sequence alone, as DP needs.
        sums: (logits, batch) to float64 [B, len(sum_names)], which add up over rows.
        sum_names: names of the columns of ``sums``.
        metrics: added-up sums to metrics.
        headline: the metric that people ask for.
        higher_is_better: whether more of the headline is better.
    """

    tokenise: Callable[[Sequence[Example], Any, DataConfig], list[TokenRow]]
    loss_per_sequence: Callable[[Tensor, Batch], Tensor]
    sums: Callable[[Tensor, Batch], Tensor]
    sum_names: tuple[str, ...]
    metrics: Callable[[Sums], Metrics]
    headline: str
    higher_is_better: bool
