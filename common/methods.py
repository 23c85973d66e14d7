"""What each aggregation method trains, keeps and sends: the part of a method that sites need to know.

How the coordinator combines updates is in ``server/aggregation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.config.run import RunConfig


def _all(name: str) -> bool:
    return True


def _not_a(name: str) -> bool:
    return ".lora_A." not in name


def is_head(name: str) -> bool:
    """Whether a parameter, by its saved name, is of the classification head and not of a factor or prompt."""
    return not any(part in name for part in (".lora_A.", ".lora_B.", "prompt_embeddings"))


@dataclass(frozen=True)
class Method:
    """The site's side of an aggregation method.

    Attributes:
        trains: whether a parameter, by name, is trained and its update sent. The others stay at their initial
            values, which every process derives from the run's seed, so they are never on the wire.
    """

    trains: Callable[[str], bool]


METHODS: dict[str, Method] = {
    "fedit": Method(trains=_all),
    "ffa_lora": Method(trains=_not_a),
}


def trained_names(config: RunConfig, names: Iterable[str]) -> frozenset[str]:
    """Return the names that are trained and travel, for the run's method and kind of adapter."""
    keep = is_head if config.adapter.kind == "head_only" else METHODS[config.aggregation.method].trains
    return frozenset(name for name in names if keep(name))
