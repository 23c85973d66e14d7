"""The updates of a round held side by side, for methods that need every site's factors at once.

Memory is that of all updates: K sites with factors of rank r cost K r (m + n) numbers a layer. Contributions are taken
in order of site, so that the order of arrival does not change a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.errors import AdmissionError
from common.factors import Factors, factors_of
from common.tensors import Tensors

LARGEST_VALUE = 2.0**20
"""Largest |value| of a contribution, as of an exact sum's term."""


@dataclass(frozen=True)
class Contribution:
    """What one site brought.

    Attributes:
        local: the site's own values after training, for what it sent; float32. Factors may be of a lower rank.
        weight: not normalised.
    """

    local: Tensors
    weight: float


@dataclass(frozen=True)
class Gathered:
    """The contributions of a round by site."""

    by_site: Mapping[str, Contribution]

    def ordered(self) -> list[Contribution]:
        """Return the contributions in order of site."""
        return [self.by_site[site] for site in sorted(self.by_site)]

    def weights(self) -> list[float]:
        """Return the weights in order of site, with sum 1."""
        weights = [one.weight for one in self.ordered()]
        return [weight / sum(weights) for weight in weights]

    def weighed(self, weights: Mapping[str, float]) -> Gathered:
        """Return the contributions of the sites whose weight is not 0, with those weights."""
        return Gathered({s: Contribution(one.local, weights[s]) for s, one in self.by_site.items() if weights[s] > 0})

    def factors(self, layer: str) -> list[Factors]:
        """Return B and A of a layer at every site, in order of site; float64."""
        return [factors_of(one.local, layer) for one in self.ordered()]

    def mean(self, name: str, weights: list[float] | None = None) -> Tensor:
        """Return Σ w x of a tensor that has one shape at all sites, in float64.

        Args:
            name: of the tensor.
            weights: in order of site; the declared ones if not given.
        """
        found = [one.local[name].double() for one in self.ordered()]
        chosen = self.weights() if weights is None else weights
        total = found[0] * chosen[0]
        for value, weight in zip(found[1:], chosen[1:], strict=True):
            total = total + value * weight
        return total


def init(adapter: Tensors) -> Gathered:
    """Return the empty state."""
    return Gathered({})


def update(state: Gathered, site: str, local: Tensors, weight: float) -> Gathered:
    """Add what one site brought: its own values after training, for what it sent.

    Raises:
        AdmissionError: reason "range", if a value is so large that products would overflow.
    """
    for name, value in local.items():
        if value.numel() and float(value.abs().max()) > LARGEST_VALUE:
            raise AdmissionError("range", f"{name} holds values too large to multiply; expected below 1e6")
    return Gathered({**state.by_site, site: Contribution(local, weight)})
