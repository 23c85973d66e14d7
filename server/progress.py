"""What a coordinator carries from one round to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.tensors import Tensors


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two rounds.

    Attributes:
        adapter: the whole adapter by name, with a correction to the base; float32.
        clip_norm: where adaptive clipping stands; None without it.
        moments: of the server optimizer; empty without one.
    """

    adapter: Tensors
    clip_norm: float | None = None
    moments: Tensors = field(default_factory=dict)
