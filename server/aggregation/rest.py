"""What is no factor (the head, as a rule) is averaged, whatever a method does with the factors."""

from __future__ import annotations

from common.factors import is_factor
from common.tensors import Tensors
from server.aggregation.gathered import Gathered


def averaged_rest(gathered: Gathered, adapter: Tensors) -> Tensors:
    """Return ``adapter`` with every tensor that was sent and is no factor replaced by its weighted mean."""
    sent = gathered.ordered()[0].local
    return {
        name: gathered.mean(name).float() if name in sent and not is_factor(name) else value
        for name, value in adapter.items()
    }
