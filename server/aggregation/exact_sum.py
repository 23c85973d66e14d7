"""A weighted sum whose bits do not depend on the order of its terms.

Floating-point addition is not associative, so a streamed average would depend on which site answers first. Terms are
rounded once to a fixed-point grid of 2⁻³⁶ and added as 64-bit integers, which is exact: any order, any grouping, same
bits, with one accumulator however many sites there are. The error of a term is 2⁻³⁷ (7e-12) at most, whatever its
size: at 1e-2 a fiftieth of float32's resolution, at 1e-6 up to 7e-6 of the value, and below 7e-12 all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from common.errors import AdmissionError
from common.tensors import Tensors

FRACTION_BITS = 36
_SCALE = 2.0**FRACTION_BITS
_LARGEST_TERM = 2.0**20
"""Largest |weight x value| of a term; weights are at most 1. That the sum fits is checked at every term."""


@dataclass
class ExactSum:
    """Σ w_k u_k by name, as int64 multiples of 2⁻³⁶, and Σ w_k.

    Attributes:
        totals: int64 tensors by name.
        weight: sum of the weights, exact too.
        count: number of terms.
    """

    totals: dict[str, Tensor]
    weight: Fraction = Fraction(0)
    count: int = 0

    @classmethod
    def zero(cls, like: Tensors) -> ExactSum:
        """Return an empty sum for tensors shaped as ``like``."""
        return cls({name: torch.zeros(value.shape, dtype=torch.int64) for name, value in like.items()})

    def add(self, update: Tensors, weight: float) -> None:
        """Add ``weight * update``.

        Raises:
            AdmissionError: reason "range", before anything is added, if a term or the sum would not fit.
        """
        terms = {name: value.double() * weight for name, value in update.items()}
        for name, term in terms.items():
            largest = float(term.abs().max()) if term.numel() else 0.0
            standing = float(self.totals[name].abs().max()) if term.numel() else 0.0
            if largest > _LARGEST_TERM or largest * _SCALE + standing > 2.0**62:
                raise AdmissionError("range", f"{name} holds values too large to add; expected below 1e6")
        for name, term in terms.items():
            self.totals[name] += torch.round(term * _SCALE).to(torch.int64)
        self.weight += Fraction(weight)
        self.count += 1

    def mean(self) -> Tensors:
        """Return Σ w_k u_k / Σ w_k as float32 tensors."""
        divisor = _SCALE * float(self.weight)
        return {name: (total.double() / divisor).float() for name, total in self.totals.items()}
