"""Arithmetic on named tensors: adapters, updates and their manifests."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Manifest = dict[str, tuple[int, ...]]

LARGEST_WEIGHT = 1e4
"""Largest |value| in an adapter that sites take: no trained one has it, and beyond it gradients overflow."""


def manifest_of(tensors: Mapping[str, Tensor]) -> Manifest:
    """Return the shape of every tensor by name, sorted."""
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def subtract(local: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensors:
    """Return the update: ``local - received`` for every name of ``local``."""
    return {name: value - received[name] for name, value in local.items()}


def add(adapter: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensors:
    """Return ``adapter + update``; names without an update are kept as they are."""
    return {name: value + update[name] if name in update else value for name, value in adapter.items()}


def l2_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm over all entries, computed in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())


def is_usable(adapter: Mapping[str, Tensor], largest: float = LARGEST_WEIGHT) -> bool:
    """Whether all entries are numbers of at most ``largest``."""
    return is_finite(adapter) and all(
        float(value.abs().max()) <= largest for value in adapter.values() if value.numel()
    )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, over names, shapes and float32 values in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}\0{tuple(value.shape)}\0".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
