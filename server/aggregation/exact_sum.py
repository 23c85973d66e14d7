"""A weighted sum whose bits do not depend on the order of its terms.

Floating-point addition is not associative, so a streamed average would depend on which site answers first. Terms are
cut to a fixed-point grid in two parts, multiples of 2⁻³⁶ and of 2⁻⁷⁶ for what is left of them, and each part is added
as 64-bit integers, which is exact: any order, any grouping, same bits, with one accumulator however many sites there
are. The error of a term is 2⁻⁷⁷ (7e-24) at most, beside its own rounding in float64. Weights are relative to the
largest that is declared, which may be that of a site whose update never counts: even with all others a billionth of it,
an entry of 1e-6 keeps 8 digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from common.errors import AdmissionError
from common.tensors import Tensors

FRACTION_BITS, REST_BITS = 36, 40
_SCALE, _REST_SCALE = 2.0**FRACTION_BITS, 2.0**REST_BITS
_MOST_TERMS = 2**22
"""Terms that the sum of rests holds: each is at most 2³⁹ of its units."""
_LARGEST_TERM = 2.0**20
"""Largest |weight x value| of a term; weights are at most 1. That the sum fits is checked at every term."""


@dataclass
class ExactSum:
    """Σ w_k u_k by name, and Σ w_k.

    Attributes:
        totals: int64 tensors by name, in units of 2⁻³⁶.
        rests: int64 tensors by name, in units of 2⁻⁷⁶: what rounding to the totals' units left.
        weight: sum of the weights, exact too.
        count: number of terms.
    """

    totals: dict[str, Tensor]
    rests: dict[str, Tensor]
    weight: Fraction = Fraction(0)
    count: int = 0

    @classmethod
    def zero(cls, like: Tensors) -> ExactSum:
        """Return an empty sum for tensors shaped as ``like``."""
        return cls(_zeros(like), _zeros(like))

    def add(self, update: Tensors, weight: float) -> None:
        """Add ``weight * update``.

        Raises:
            AdmissionError: reason "range", before anything is added, if a term or the sum would not fit.
        """
        terms = {name: value.double() * (weight * _SCALE) for name, value in update.items()}
        for name, term in terms.items():
            largest = float(term.abs().max()) if term.numel() else 0.0
            standing = float(self.totals[name].abs().max()) if term.numel() else 0.0
            if largest > _LARGEST_TERM * _SCALE or largest + standing > 2.0**62:
                raise AdmissionError("range", f"{name} holds values too large to add; expected below 1e6")
        if self.count >= _MOST_TERMS:
            raise AdmissionError("range", f"a sum of {self.count} updates is full; expected fewer in a round")
        for name, term in terms.items():
            whole = term.round()
            self.totals[name] += whole.to(torch.int64)
            self.rests[name] += term.sub_(whole).mul_(_REST_SCALE).round_().to(torch.int64)
        self.weight += Fraction(weight)
        self.count += 1

    def mean(self) -> Tensors:
        """Return Σ w_k u_k / Σ w_k as float32 tensors."""
        divisor = _SCALE * float(self.weight)
        return {
            name: ((total.double() + self.rests[name].double() / _REST_SCALE) / divisor).float()
            for name, total in self.totals.items()
        }


def _zeros(like: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros(value.shape, dtype=torch.int64) for name, value in like.items()}
