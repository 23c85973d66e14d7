"""Per-person gradients: the rows of a person are summed before they are clipped together.

Rows come in micro-batches with those of one person next to each other. The last person of a micro-batch may go on in
the next one, so its sum is held back until another person begins or the step ends; memory is that of one person more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PersonSums:
    """Folds per-row gradients and losses into per-person ones."""

    def __init__(self) -> None:
        self._hold(None, [], torch.zeros(1, dtype=torch.float64), 0)

    def _hold(self, person: int | None, gradients: list[Tensor], loss: Tensor, rows: int) -> None:
        """Keep what a person has so far; None where nobody is held back."""
        self._person, self._gradients, self._loss, self._rows = person, gradients, loss, rows

    def fold(self, gradients: Sequence[Tensor], losses: Tensor, persons: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Take a micro-batch and return what is complete: gradients [P, ...] and mean losses [P].

        Args:
            gradients: per-row gradients of every parameter, each [b, ...].
            losses: of each row [b].
            persons: of each row; equal ones adjacent, also across micro-batches.
        """
        order = list(dict.fromkeys(persons))
        position = torch.tensor([order.index(person) for person in persons], device=losses.device)
        sums = [g.new_zeros((len(order), *g.shape[1:])).index_add_(0, position, g) for g in gradients]
        place = position.cpu()
        totals = torch.zeros(len(order), dtype=torch.float64).index_add_(0, place, losses.detach().cpu().double())
        rows = torch.bincount(place, minlength=len(order))
        if self._person == order[0]:
            for held, own in zip(self._gradients, sums, strict=True):
                own[0] += held[0]
            totals[0] += self._loss[0]
            rows[0] += self._rows
        elif self._person is not None:
            sums = [torch.cat([held, own]) for held, own in zip(self._gradients, sums, strict=True)]
            totals, rows = torch.cat([self._loss, totals]), torch.cat([torch.tensor([self._rows]), rows])
        self._hold(order[-1], [own[-1:].clone() for own in sums], totals[-1:].clone(), int(rows[-1]))
        return [own[:-1] for own in sums], totals[:-1] / rows[:-1]

    def flush(self) -> tuple[list[Tensor], Tensor] | None:
        """Return what is held back, or None where nothing is."""
        if self._person is None:
            return None
        found = self._gradients, self._loss / self._rows
        self._hold(None, [], torch.zeros(1, dtype=torch.float64), 0)
        return found
