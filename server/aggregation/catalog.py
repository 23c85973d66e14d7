"""The aggregation methods by the name they have in the run config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.tensors import Tensors
from server.aggregation import averaging
from server.aggregation.exact_sum import ExactSum


@dataclass(frozen=True)
class Aggregator:
    """A method as three functions.

    Attributes:
        init: adapter to an empty state.
        update: (state, one site's update, its weight) to the next state.
        finish: (state, adapter of the round) to the next adapter.
    """

    init: Callable[[Tensors], ExactSum]
    update: Callable[[ExactSum, Tensors, float], ExactSum]
    finish: Callable[[ExactSum, Tensors], Tensors]


AGGREGATORS: dict[str, Aggregator] = {
    "fedit": Aggregator(averaging.init, averaging.update, averaging.finish),
    "ffa_lora": Aggregator(averaging.init, averaging.update, averaging.finish),
}
