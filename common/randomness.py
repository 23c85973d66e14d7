"""Where random choices come from.

Whatever must be repeatable (initial adapter, cohorts, data order, partition) is drawn from a generator keyed by
(seed, purpose, ...): two purposes never share a stream, and adding a choice never shifts another one.
Noise and Poisson sampling at a real site come from :class:`SystemRandomness` instead, because a coordinator who
knows the seed could subtract the noise. A virtual site may be keyed, so that a simulation can be repeated.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor


def _digest(*parts: str | int) -> bytes:
    """SHA-256 over typed, length-prefixed parts, so that ("a", "bc") and ("ab", "c") differ."""
    digest = hashlib.sha256()
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return digest.digest()


def stream_seed(seed: int, purpose: str, *key: str | int) -> int:
    """Return the 64-bit seed of the stream named by ``(seed, purpose, *key)``."""
    return int.from_bytes(_digest(seed, purpose, *key)[:8], "big")


def torch_generator(seed: int, purpose: str, *key: str | int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for the stream named by ``(seed, purpose, *key)``."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *key) & (2**63 - 1))


def numpy_generator(seed: int, purpose: str, *key: str | int) -> np.random.Generator:
    """Return a NumPy ``Generator`` (PCG64) for the stream named by ``(seed, purpose, *key)``."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *key)))


def uniform(rows: int, columns: int, bound: float, generator: torch.Generator) -> Tensor:
    """Return uniform numbers within ±bound, float32 [rows, columns]: the same bits on every CPU.

    torch's own ``uniform_`` rounds once or twice, by what the CPU can do. This rounds as it does with AVX2.
    """
    high, low = torch.tensor(bound), torch.tensor(-bound)
    drawn = torch.rand(rows, columns, generator=generator)
    return (drawn.double() * (high - low).double() + low.double()).float()


def normal(shape: Sequence[int], spread: float, generator: torch.Generator) -> Tensor:
    """Return normal numbers of standard deviation ``spread``, float32: the same bits on every CPU, but for rare ties.

    Box-Muller in float64, of the uniform numbers that torch's own ``normal_`` takes and in its order, so that they are
    those of it but for float32 rounding, which differs between CPUs there.
    """
    count = math.prod(shape)
    drawn = torch.rand(count, generator=generator)
    values = torch.empty(count, dtype=torch.float64)
    whole = count // 16 * 16
    values[:whole] = _box_muller(drawn[:whole].view(-1, 16))
    if count > whole:
        rest = min(count, 16)
        values[-rest:] = _box_muller(torch.rand(1, 16, generator=generator))[-rest:]
    return (values * spread).float().view(tuple(shape))


def _box_muller(drawn: Tensor) -> Tensor:
    """Return standard normal numbers, float64 [16 n], of uniform ones in [0, 1), float32 [n, 16]."""
    radius = torch.sqrt(-2.0 * torch.log((1.0 - drawn[:, :8]).double()))
    angle = 2.0 * math.pi * drawn[:, 8:].double()
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).flatten()


class CryptoStream:
    """Uniform and normal numbers from a ChaCha20 keystream (RFC 8439): unpredictable to whoever lacks the key.

    Normals come from the Box-Muller transform in float64. Rounding to float32 when they are added leaves the known
    weakness of floating-point noise (Mironov 2012; 2107.10138): low-order bits of a sum may tell on its terms.

    Args:
        key: 32 bytes. One key, one stream: the same key gives the same numbers.
    """

    def __init__(self, key: bytes) -> None:
        self._keystream = Cipher(algorithms.ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()

    def uniform(self, count: int) -> Tensor:
        """Return ``count`` float64 numbers in the open interval (0, 1), multiples of 2⁻⁵³ shifted by half of one."""
        words = np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")
        return torch.from_numpy(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal float64 numbers of ``shape``."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = self.uniform(half).log_().mul_(-2.0).sqrt_()
        angle = self.uniform(half).mul_(2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(tuple(shape))


class PrivateRandomness(Protocol):
    """Source of the randomness that privacy rests on: one fresh stream for a purpose and round."""

    @property
    def repeatable(self) -> bool:
        """Whether the streams follow from a seed."""

    def stream(self, purpose: str, round_number: int) -> CryptoStream:
        """Return the stream for one purpose ("noise", "sampling") in one round."""


@dataclass(frozen=True)
class SystemRandomness:
    """Streams keyed by the operating system: never the same twice."""

    repeatable: bool = False

    def stream(self, purpose: str, round_number: int) -> CryptoStream:
        """Return a stream with a fresh key of the operating system; arguments do not matter."""
        return CryptoStream(secrets.token_bytes(32))


@dataclass(frozen=True)
class KeyedRandomness:
    """Repeatable streams for a virtual site. Never for a real one: who knows ``seed`` can subtract the noise."""

    seed: int
    site: str
    repeatable: bool = True

    def stream(self, purpose: str, round_number: int) -> CryptoStream:
        """Return the stream keyed by (seed, purpose, round, site)."""
        return CryptoStream(_digest(self.seed, purpose, round_number, self.site))
