"""Bounds on how far one site can move a round: the norm of its update, its share of the weight, and what came of it.

The bound by the cohort's median needs the norms of all: updates are held until the round ends, and only then added.
More than half of the sites must be honest. An absolute bound is part of :mod:`server.admission`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from common.factors import Factors, layers_of, product_norm
from common.tensors import LARGEST_WEIGHT, Tensors, is_usable, l2_norm
from server.aggregation.products import total_of
from server.late import Asked

_REACH = 0.98 * LARGEST_WEIGHT
"""Largest value of an adapter that is sent: a codec rounds up by less than the rest."""
LONGEST_PRODUCT = 1e6
"""Largest ‖BA‖_F of a layer. Two in a row and their gate stay far from float32's end; training ends below 1e3."""


@dataclass(frozen=True)
class Held:
    """An update that is admitted but for its norm.

    Attributes:
        asked: what it answers.
        update: as it will be added.
        norm: L2 norm as it arrived.
        weight: in the average.
    """

    asked: Asked
    update: Tensors
    norm: float
    weight: float


@dataclass
class MedianBound:
    """Holds a round's updates and tells which are longer than a multiple of their median.

    Attributes:
        multiple: of the median norm, from 1.
        held: by a key of the round's.
    """

    multiple: float
    held: dict[str, Held] = field(default_factory=dict)

    def hold(self, key: str, asked: Asked, received: Tensors, update: Tensors, weight: float) -> None:
        """Hold an update; ``received`` is what arrived, ``update`` what will be added."""
        self.held[key] = Held(asked, update, l2_norm(received), weight)

    def beyond(self) -> dict[str, str]:
        """Return why not, for each held update that is too long, by key."""
        if not self.held:
            return {}
        middle = median(held.norm for held in self.held.values())
        return {
            key: f"norm: the update has norm {held.norm:.3g} and the cohort's median is {middle:.3g}; expected at most "
            f"{self.multiple:g} times that (aggregation.norm_bound_of_median)"
            for key, held in self.held.items()
            if held.norm > self.multiple * middle
        }

    def release(self) -> dict[str, Held]:
        """Return what is held, by key in order of it, and hold nothing any more."""
        held, self.held = self.held, {}
        return {key: held[key] for key in sorted(held)}


def capped(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Return weights none of which is more than ``share`` of their sum; the others keep theirs.

    With the k largest cut to c, c = share (k c + Σ of the rest), so that c = share Σ rest / (1 - k share) for the
    smallest k that leaves no other above c. Where so few sites cannot keep the share, all get the same.

    Args:
        weights: positive, by site.
        share: in (0, 1].
    """
    ordered = sorted(weights.values(), reverse=True)
    rest = sum(ordered)
    for k, largest in enumerate(ordered):
        if k * share >= 1.0:
            break
        cap = share * rest / (1.0 - k * share)
        if largest <= cap:
            return {site: min(weight, cap) for site, weight in weights.items()}
        rest -= largest
    return dict.fromkeys(weights, 1.0)


def beyond_use(adapter: Tensors, product: Callable[[Tensors, str], Factors] = total_of) -> str | None:
    """Return what of an adapter is so large that no site could go on from it; None if nothing.

    Args:
        adapter: a whole one, or what a site made of its own.
        product: from adapter and layer to what it changes there.
    """
    if not is_usable(adapter, _REACH):
        return f"values beyond {LARGEST_WEIGHT:g}, which no site takes"
    if any(product_norm(product(adapter, layer)) > LONGEST_PRODUCT for layer in layers_of(adapter)):
        return f"a change of a layer longer than {LONGEST_PRODUCT:g}, which no base model stands"
    return None
