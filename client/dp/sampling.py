"""Which records are in which step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from common.randomness import CryptoStream


def poisson_batches(num_examples: int, sample_rate: float, steps: int, stream: CryptoStream) -> Iterator[list[int]]:
    """Yield ``steps`` batches in which each record is, independently, with probability ``sample_rate``.

    This is the sampling that the accountant assumes; batches vary in size and may be empty.
    """
    for _ in range(steps):
        chosen = stream.uniform(num_examples) < sample_rate
        yield chosen.nonzero().flatten().tolist()


def shuffled_batches(num_examples: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield ``steps`` batches from passes over shuffled records; only without differential privacy."""
    done = 0
    while done < steps:
        order = torch.randperm(num_examples, generator=generator).tolist()
        for start in range(0, num_examples, batch_size):
            if done == steps:
                return
            yield order[start : start + batch_size]
            done += 1
