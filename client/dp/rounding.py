"""What the rounding of a forward pass can add to a clipped sum, and the margin that is kept for it.

One record more changes the padding and the micro-batches of the others, and so the last bits of *their* gradients.
With clipped gradients of norm C that adds up to a vector of norm about k u √n C over n records, u being the unit
roundoff of the dtype that the base model computes in: single roundings are as good as independent. So gradients are
clipped to C / (1 + k u √n), n the expected batch size, and noise is added for C. k was measured
(``tests/client/test_sensitivity.py``) and the margin is therefore no proof. It is smaller for half precision, where
products are summed in float32 and only results are rounded.
"""

from __future__ import annotations

import math

import torch
from torch import nn

MARGIN_ROUNDOFFS = {torch.float32: 16.0, torch.bfloat16: 1.5, torch.float16: 1.5}
"""k, by the dtype that the base model computes in; up to 9 and 1.1 were measured."""


def rounding_margin(module: nn.Module, expected_batch_size: float) -> float:
    """Return k u √n: the share of the clip norm that the rounding of n records may add.

    Args:
        module: the model; its coarsest floating dtype counts.
        expected_batch_size: n, records of a step; taken as 1 where it is less.
    """
    held = {p.dtype for p in module.parameters() if p.is_floating_point()} & MARGIN_ROUNDOFFS.keys()
    coarsest = max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    unit_roundoff = 0.5 * torch.finfo(coarsest).eps
    return MARGIN_ROUNDOFFS[coarsest] * unit_roundoff * math.sqrt(max(1.0, expected_batch_size))
