"""How the tensors of a factored layer are called; see ``common.factors``.

Apart from it, so that reading a config loads no torch.
"""

from __future__ import annotations

A, B, R = ".lora_A.weight", ".lora_B.weight", ".lora_R.weight"
FIXED_A, FIXED_B = ".fixed_A.weight", ".fixed_B.weight"


def is_factor(name: str) -> bool:
    """Whether a tensor, by its name, is a factor, a core or a correction of a layer."""
    return ".lora_" in name or is_fixed(name)


def is_fixed(name: str) -> bool:
    """Whether a tensor, by its name, is part of a correction to the base."""
    return ".fixed_" in name
