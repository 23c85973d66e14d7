"""Sequence classification: one label a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.config.data import DataConfig
from common.data.batches import Batch, TokenRow
from common.data.examples import Example
from common.tasks.task import Metrics, Sums, Task


def tokenise(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[TokenRow]:
    """Tokenise texts with the tokenizer's special tokens, cut to ``data.max_length``."""
    if not examples:
        return []
    encoded = tokenizer([example.prompt for example in examples], truncation=True, max_length=data.max_length)
    return [
        TokenRow(torch.tensor(ids, dtype=torch.int64), torch.tensor(example.label))
        for ids, example in zip(encoded["input_ids"], examples, strict=True)
    ]


def loss_per_sequence(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each row: logits [B, L] and targets [B] to [B]."""
    return functional.cross_entropy(logits, batch.targets, reduction="none")


def sums(logits: Tensor, batch: Batch) -> Tensor:
    """Per row: 1, whether the likeliest label is right, and the loss; float64 [B, 3]."""
    correct = logits.argmax(dim=-1) == batch.targets
    columns = (torch.ones_like(correct), correct, loss_per_sequence(logits, batch))
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def metrics(added: Sums) -> Metrics:
    """Accuracy in [0, 1] and mean loss in nats."""
    return {"accuracy": added["correct"] / added["rows"], "loss": added["loss"] / added["rows"]}


CLASSIFICATION = Task(
    tokenise=tokenise,
    loss_per_sequence=loss_per_sequence,
    sums=sums,
    sum_names=("rows", "correct", "loss"),
    metrics=metrics,
    headline="accuracy",
    higher_is_better=True,
)
