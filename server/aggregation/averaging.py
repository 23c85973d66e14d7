"""Methods that average updates name by name: FedIT and FFA-LoRA.

FedIT (2305.05644) averages both factors apart, Ā = Σ w A and B̄ = Σ w B; their product is not Σ w BA. FFA-LoRA
(2403.12313) freezes A at its initial value everywhere and averages B alone, so that B̄A = Σ w BA exactly. What is frozen
is decided in ``common.methods``: here both are the same weighted mean over the names that travel.
"""

from __future__ import annotations

from common.tensors import Tensors, add
from server.aggregation.exact_sum import ExactSum


def init(adapter: Tensors) -> ExactSum:
    """Return the empty state for updates shaped as ``adapter``."""
    return ExactSum.zero(adapter)


def update(state: ExactSum, site_update: Tensors, weight: float) -> ExactSum:
    """Add one site's update; order does not matter, to the bit. The state passed in must not be used again."""
    state.add(site_update, weight)
    return state


def finish(state: ExactSum, adapter: Tensors) -> Tensors:
    """Return ``adapter`` plus the weighted mean of the updates."""
    return add(adapter, state.mean())
