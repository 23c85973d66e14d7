"""The aggregation methods by the name they have in the run config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.config.federation import AggregationConfig
from common.tensors import Tensors
from server.aggregation import averaging, gathered, hetlora, residual, svd


@dataclass(frozen=True)
class Aggregator:
    """A method as three functions.

    A linear method (see ``common.methods``) streams: ``update`` takes updates, and ``finish`` their weighted mean, to
    which noise may have been added or a server optimizer applied. Any other gathers: ``update`` takes each site's own
    values, and ``finish`` the state.

    Attributes:
        init: what sites send, as it stands in the round's adapter, to an empty state.
        update: (state, site, one site's update or values, its weight) to the next state.
        finish: (mean update or state, whole adapter of the round) to the next whole adapter.
    """

    init: Callable[[Tensors], Any]
    update: Callable[[Any, str, Tensors, float], Any]
    finish: Callable[[Any, Tensors], Tensors]


_LINEAR = Aggregator(averaging.init, averaging.update, averaging.finish)


def _gathering(finish: Callable[[Any, Tensors], Tensors]) -> Callable[[AggregationConfig], Aggregator]:
    return lambda settings: Aggregator(gathered.init, gathered.update, finish)


def _linear(settings: AggregationConfig) -> Aggregator:
    return _LINEAR


AGGREGATORS: dict[str, Callable[[AggregationConfig], Aggregator]] = {
    "fedit": _linear,
    "ffa_lora": _linear,
    "rolora": _linear,
    "fedsa_lora": _linear,
    "flora": _gathering(residual.finish_flora),
    "flexlora": _gathering(svd.finish_flexlora),
    "hetlora": _gathering(hetlora.finish),
    "fedex_lora": _gathering(residual.finish_fedex),
    "lora_fair": lambda settings: Aggregator(
        gathered.init, gathered.update, partial(residual.finish_lora_fair, penalty=settings.residual_penalty)
    ),
    "fedsvd": lambda settings: Aggregator(averaging.init, averaging.update, svd.finish_fedsvd),
    "fed_sb": _linear,
}


def aggregator_of(settings: AggregationConfig) -> Aggregator:
    """Return the method that a run config asks for."""
    return AGGREGATORS[settings.method](settings)
