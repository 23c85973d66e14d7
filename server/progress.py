"""What a coordinator carries from one round to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.tensors import Tensors
from server.variates import Controls


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two rounds.

    Attributes:
        adapter: the whole adapter by name, with a correction to the base; float32.
        clip_norm: where adaptive clipping stands; None without it.
        moments: of the server optimizer; empty without one.
        controls: control variates; empty without them.
    """

    adapter: Tensors
    clip_norm: float | None = None
    moments: Tensors = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)
