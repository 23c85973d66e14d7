"""Where random choices come from.

Whatever must be repeatable (initial adapter, cohorts, data order, partition) is drawn from a generator keyed by
(seed, purpose, ...): two purposes never share a stream, and adding a choice never shifts another one.
Noise and Poisson sampling at a real site come from :class:`SystemRandomness` instead, because a coordinator who
knows the seed could subtract the noise. A virtual site may be keyed, so that a simulation can be repeated.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *key: str | int) -> int:
    """Return the 64-bit seed of the stream named by ``(seed, purpose, *key)``.

    SHA-256 over the length-prefixed parts, so that ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.sha256()
    for part in (seed, purpose, *key):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big")


def torch_generator(seed: int, purpose: str, *key: str | int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for the stream named by ``(seed, purpose, *key)``."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *key) & (2**63 - 1))


def numpy_generator(seed: int, purpose: str, *key: str | int) -> np.random.Generator:
    """Return a NumPy ``Generator`` (PCG64) for the stream named by ``(seed, purpose, *key)``."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *key)))


class PrivateRandomness(Protocol):
    """Source of the randomness that privacy rests on: one fresh generator per purpose and round."""

    @property
    def repeatable(self) -> bool:
        """Whether the streams follow from a seed."""

    def generator(self, purpose: str, round_number: int) -> torch.Generator:
        """Return a CPU generator for one purpose ("noise", "sampling") in one round."""


@dataclass(frozen=True)
class SystemRandomness:
    """Generators seeded by the operating system: never the same stream twice."""

    repeatable: bool = False

    def generator(self, purpose: str, round_number: int) -> torch.Generator:
        """Return a generator with a fresh 64-bit seed of the operating system; arguments do not matter."""
        return torch.Generator().manual_seed(secrets.randbits(63))


@dataclass(frozen=True)
class KeyedRandomness:
    """Repeatable generators for a virtual site. Never for a real one: who knows ``seed`` can subtract the noise."""

    seed: int
    site: str
    repeatable: bool = True

    def generator(self, purpose: str, round_number: int) -> torch.Generator:
        """Return the generator keyed by (seed, purpose, round, site)."""
        return torch_generator(self.seed, purpose, round_number, self.site)
