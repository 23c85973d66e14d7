"""Methods that average what travels name by name: linear sums, streamed and exact in any order.

FedIT (2305.05644) averages both factors apart, Ā = Σ w A and B̄ = Σ w B; their product is not Σ w BA.
FFA-LoRA (2403.12313) freezes A at its initial value everywhere and averages B alone, so that B̄A = Σ w BA exactly.
RoLoRA (2502.01755) trains and averages B in odd rounds with A fixed, and A in even rounds with B fixed: either way the
product of the average is the average of the products.
FedSA-LoRA (2410.01463) trains both, averages A, and leaves B at each site; there is no single global adapter.
Fed-SB (2502.15436) has ΔW = B R A with B and A fixed and averages R [r, r]: B R̄ A = Σ w B R A exactly.

What is trained and what travels is decided in ``common.methods``: here all are the same weighted mean of updates over
the names that were sent.
"""

from __future__ import annotations

from common.tensors import Tensors, add
from server.aggregation.exact_sum import ExactSum


def init(sent: Tensors) -> ExactSum:
    """Return the empty state for updates shaped as ``sent``."""
    return ExactSum.zero(sent)


def update(state: ExactSum, site: str, site_update: Tensors, weight: float) -> ExactSum:
    """Add one site's update; order does not matter, to the bit. The state passed in must not be used again."""
    state.add(site_update, weight)
    return state


def finish(mean: Tensors, adapter: Tensors) -> Tensors:
    """Return ``adapter`` plus the aggregated update."""
    return add(adapter, mean)
