"""Causal language modelling: a completion learnt after its prompt, or the assistant's turns of a chat.

The loss of a sequence is the mean over its own completion tokens. transformers' ``out.loss`` averages over all tokens
of the batch instead, which makes one record's gradient depend on the others: wrong under DP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional

from common.config.data import DataConfig
from common.data.batches import IGNORED, Batch, TokenRow
from common.data.examples import Example
from common.errors import DataError
from common.tasks.task import Metrics, Sums, Task

Span = tuple[int, int]


def tokenise(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[TokenRow]:
    """Tokenise prompt and completion (or the chat template's rendering) as one text.

    A token is learnt if it ends inside a completion; prompt-completion rows end with the end-of-text token, which is
    learnt too. Rows longer than ``data.max_length`` lose their end, or, where nothing to learn would be left, their
    beginning.
    """
    if not examples:
        return []
    rows: list[TokenRow | None] = [None] * len(examples)
    for chat in (False, True):
        chosen = [index for index, example in enumerate(examples) if bool(example.messages) == chat]
        if chosen:
            part = _tokenise_alike([examples[index] for index in chosen], tokenizer, data, chat=chat)
            for index, row in zip(chosen, part, strict=True):
                rows[index] = row
    return [row for row in rows if row is not None]


def _tokenise_alike(examples: Sequence[Example], tokenizer: Any, data: DataConfig, *, chat: bool) -> list[TokenRow]:
    rendered = [_render(example, tokenizer, data) for example in examples]
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=not chat, return_offsets_mapping=True)
    rows = []
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
        learnt = [any(start < end <= stop for start, stop in spans) and end > begin for begin, end in offsets]
        if not chat and tokenizer.eos_token_id is not None:
            body = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
            ids, learnt = [*body, tokenizer.eos_token_id], [*learnt[: len(body)], True]
        rows.append(_cut(ids, learnt, data.max_length))
    return rows


def _render(example: Example, tokenizer: Any, data: DataConfig) -> tuple[str, list[Span]]:
    """Return the text of a row and the character spans that are learnt."""
    if not example.messages:
        prompt = data.prompt_template.replace("{prompt}", example.prompt)
        return prompt + example.completion, [(len(prompt), len(prompt) + len(example.completion))]
    if not tokenizer.chat_template:
        raise DataError(
            "data.train holds chat messages but the tokenizer has no chat template; expected one. "
            "Choose a chat model, or rows with prompt and completion."
        )
    messages = [{"role": role, "content": content} for role, content in example.messages]
    try:
        return _render_chat(messages, tokenizer)
    except (ValueError, IndexError, KeyError, TypeError, TemplateError) as error:
        raise DataError(
            f"the tokenizer's chat template refuses a conversation ({type(error).__name__}); expected turns it knows, "
            "as a rule user and assistant in alternation, the user first. Correct the messages."
        ) from None


def _render_chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[Span]]:
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise DataError(
                "the tokenizer's chat template rewrites earlier turns; expected one that only appends. "
                "Keep one assistant turn in each row."
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _cut(ids: list[int], learnt: list[bool], length: int) -> TokenRow:
    keep = slice(0, length) if any(learnt[1:length]) else slice(max(0, len(ids) - length), len(ids))
    tokens = torch.tensor(ids[keep], dtype=torch.int64)
    targets = torch.where(torch.tensor(learnt[keep]), tokens, IGNORED)
    targets[0] = IGNORED
    return TokenRow(tokens, targets)


def _token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token losses [B, T-1] (0 where not learnt) and which are learnt [B, T-1]."""
    targets = batch.targets[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses, targets != IGNORED


def loss_per_sequence(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss over each sequence's own learnt tokens: logits [B, T, V] to [B]."""
    losses, learnt = _token_losses(logits, batch)
    return losses.sum(dim=1) / learnt.sum(dim=1).clamp(min=1)


def sums(logits: Tensor, batch: Batch) -> Tensor:
    """Per row: 1, number of learnt tokens, tokens predicted right, and their summed loss; float64 [B, 4]."""
    losses, learnt = _token_losses(logits, batch)
    right = (logits[:, :-1].argmax(dim=-1) == batch.targets[:, 1:]) & learnt
    rows = torch.ones(len(batch), device=losses.device)
    columns = (rows, learnt.sum(dim=1), right.sum(dim=1), losses.cpu().double().sum(dim=1))
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def metrics(added: Sums) -> Metrics:
    """Perplexity of the completions, mean loss in nats a token, and token accuracy in [0, 1]."""
    tokens = max(added["tokens"], 1.0)
    loss = added["loss"] / tokens
    perplexity = math.exp(min(loss, 700.0))
    return {"perplexity": perplexity, "loss": loss, "token_accuracy": added["correct"] / tokens}


CAUSAL_LM = Task(
    tokenise=tokenise,
    loss_per_sequence=loss_per_sequence,
    sums=sums,
    sum_names=("rows", "tokens", "correct", "loss"),
    metrics=metrics,
    headline="perplexity",
    higher_is_better=False,
)
