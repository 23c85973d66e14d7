from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from common.config.run import RunConfig
from common.data.batches import IGNORED, Collator, Limit, TokenRow, micro_batches
from common.data.examples import Example
from common.errors import DataError
from common.tasks import causal_lm, classification
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer


def words(row: TokenRow, learnt: bool) -> str:
    tokenizer = tiny_tokenizer()
    ids = row.input_ids[row.targets != IGNORED] if learnt else row.input_ids
    return str(tokenizer.decode(ids))


@pytest.fixture
def causal(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config("llama", "causal_lm")


def test_only_completion_and_end_are_learnt(causal: RunConfig) -> None:
    (row,) = causal_lm.tokenise([Example("what about the knee ", "rest the knee")], tiny_tokenizer(), causal.data)
    assert words(row, learnt=True) == "rest the knee [SEP]"
    assert words(row, learnt=False) == "[CLS] what about the knee rest the knee [SEP]"


def test_prompt_template_is_filled_without_reading_braces(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("llama", "causal_lm", data={"prompt_template": "question {prompt} answer "})
    (row,) = causal_lm.tokenise([Example("{0} {x}", "rest")], tiny_tokenizer(), config.data)
    assert words(row, learnt=False) == "[CLS] question [UNK] [UNK] answer rest [SEP]"


@pytest.mark.parametrize("prompt_words", [3, 60])
def test_long_row_keeps_something_to_learn(causal: RunConfig, prompt_words: int) -> None:
    example = Example("the " * prompt_words, "rest " * 40)
    (row,) = causal_lm.tokenise([example], tiny_tokenizer(), causal.data)
    assert len(row) == causal.data.max_length
    assert (row.targets != IGNORED).sum() > 0


def test_chat_learns_every_assistant_turn_and_nothing_else(causal: RunConfig) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = (("user", "the knee"), ("assistant", "rest it"), ("user", "and hip"), ("assistant", "call"))
    (row,) = causal_lm.tokenise([Example("", messages=turns)], tokenizer, causal.data)
    assert words(row, learnt=True) == "rest it [SEP] call [SEP]"
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        causal_lm.tokenise([Example("", messages=turns)], tokenizer, causal.data)


def test_chat_template_that_rewrites_earlier_turns_is_refused(causal: RunConfig) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} " + CHAT_TEMPLATE
    turns = (("user", "the knee"), ("assistant", "rest"), ("user", "and"), ("assistant", "call"))
    with pytest.raises(DataError, match="only appends"):
        causal_lm.tokenise([Example("", messages=turns)], tokenizer, causal.data)


def random_batch(lengths: list[int], vocabulary: int = 11) -> Any:
    torch.manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,))
        targets = ids.clone()
        targets[: length // 2] = IGNORED
        targets[0] = IGNORED
        rows.append(TokenRow(ids, targets))
    return Collator(0)(rows)


def test_causal_loss_is_the_mean_over_each_sequence_alone() -> None:
    batch = random_batch([5, 9, 3])
    logits = torch.randn(3, 9, 11)
    losses = causal_lm.loss_per_sequence(logits, batch)
    for row, length in enumerate([5, 9, 3]):
        target = batch.targets[row, 1:length]
        alone = functional.cross_entropy(logits[row, : length - 1], target, ignore_index=IGNORED)
        torch.testing.assert_close(losses[row], alone)


def test_causal_metrics_count_tokens_not_rows() -> None:
    batch = random_batch([5, 9, 3])
    logits = torch.randn(3, 9, 11)
    added = dict(zip(causal_lm.CAUSAL_LM.sum_names, causal_lm.sums(logits, batch).sum(dim=0).tolist(), strict=True))
    metrics = causal_lm.metrics(added)
    whole = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.targets[:, 1:].flatten(), ignore_index=IGNORED)
    assert metrics["loss"] == pytest.approx(float(whole), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(float(whole)), rel=1e-5)


def test_classification_metrics_are_accuracy_and_mean_loss() -> None:
    rows = [TokenRow(torch.tensor([1, 2]), torch.tensor(label)) for label in (0, 1, 1)]
    batch = Collator(0)(rows)
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    added = dict(
        zip(classification.CLASSIFICATION.sum_names, classification.sums(logits, batch).sum(0).tolist(), strict=True)
    )
    metrics = classification.metrics(added)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["loss"] == pytest.approx(float(functional.cross_entropy(logits, batch.targets)), rel=1e-6)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 60),
)
@settings(deadline=None)
def test_micro_batches_hold_each_row_once_longest_first(
    lengths: list[int], most: int | None, tokens: int | None
) -> None:
    cut = micro_batches(lengths, range(len(lengths)), Limit(most, tokens))
    flat = [index for batch in cut for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(cut)
    assert all(most is None or len(batch) <= most for batch in cut)
    assert all(tokens is None or len(batch) == 1 or sum(lengths[i] for i in batch) <= tokens for batch in cut)
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_the_asked_side(side: str) -> None:
    rows = [TokenRow(torch.tensor([5, 6, 7]), torch.tensor(0)), TokenRow(torch.tensor([8]), torch.tensor(1))]
    batch = Collator(3, side)(rows)
    short = [8, 3, 3] if side == "right" else [3, 3, 8]
    assert batch.input_ids.tolist() == [[5, 6, 7], short]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [int(i == 8) for i in short]]
