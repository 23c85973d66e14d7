"""One record more moves the clipped sum by at most the clip norm, to a relative 1e-6: the fact that all of ε rests on.

The record that is added is the longest, so that everybody else's padding changes with it; micro-batches are cut anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from client.dp.rounding import rounding_margin
from client.dp.step import DpStep
from common.config.run import RunConfig
from common.data.batches import Collator, Limit, TokenRow, micro_batches
from common.data.federated import load_federated_data
from common.models.adapter import AdaptedModel
from common.models.resident import resident_model
from common.randomness import CryptoStream
from common.tasks.catalog import TASKS
from common.tensors import Tensors, l2_norm, subtract
from tests.mechanisms import mechanism_of


class Recording(torch.optim.SGD):
    """Keeps the gradient it is given and moves nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradients."""
        self.seen = [p.grad.detach().double().clone() for p in self.param_groups[0]["params"]]


def clipped_sum(model: AdaptedModel, config: RunConfig, rows: list[TokenRow], size: int, **rule: Any) -> Tensors:
    parameters = model.train_only(frozenset(model.parameters))
    optimizer = Recording(parameters.values(), lr=1.0)
    model.module.train()
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    stream = CryptoStream(bytes(32))
    with DpStep(model.module, parameters, optimizer, mechanism_of(**rule), stream, batch_first=True) as step:
        for chosen in micro_batches([len(row) for row in rows], range(len(rows)), Limit(rows=size)):
            batch = collate([rows[index] for index in chosen])
            logits = model.logits(batch.input_ids, batch.attention_mask)
            step.micro_batch(TASKS[config.data.task].loss_per_sequence(logits, batch), len(rows))
        step.apply(len(rows))
    return dict(zip(parameters, optimizer.seen, strict=True))


def strong_adapter(config: RunConfig) -> AdaptedModel:
    """A model whose adapter has something to say, so that no gradient is zero."""
    model = resident_model(config)
    torch.manual_seed(1)
    model.load({name: torch.randn_like(value) * 0.3 for name, value in model.state().items()})
    return model


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), ("gpt2", "causal_lm"), ("llama", "causal_lm"), ("llama", "classification")],
)
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_one_record_more_moves_the_sum_by_at_most_the_clip(
    make_config: Callable[..., RunConfig], family: str, task: str, clipping: str
) -> None:
    config = make_config(family, task, adapter={"target_modules": "all-linear"})
    model = strong_adapter(config)
    if family == "gpt2":
        assert model.base.module.get_input_embeddings().weight is model.base.module.get_output_embeddings().weight
    examples = load_federated_data(config.data, config.seed).train["site 0"]
    rows = sorted(TASKS[task].tokenise(examples, model.base.tokenizer, config.data), key=len)
    if task == "causal_lm":
        rows = [TokenRow(row.input_ids[:cut], row.targets[:cut]) for cut, row in zip(range(8, 99), rows, strict=False)]
    assert len(rows[-1]) > len(rows[0])
    share = {"quantile_share": 0.05} if clipping == "adaptive" else {}
    for clip in (0.01, 0.3):
        for size in (3, 64):
            rule = {"clip": clip, "clipping": clipping, **share}
            without = clipped_sum(model, config, rows[:-1], size, **rule)
            with_one = clipped_sum(model, config, rows, size, **rule)
            moved = l2_norm(subtract(with_one, without))
            assert 0.1 * clip < moved <= clip * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounding_of_hundreds_of_records_stays_within_the_margin(
    make_config: Callable[..., RunConfig], family: str, dtype: str
) -> None:
    """What the rounding of all others adds is at most what clipping leaves, so that even aligned it is within C."""
    config = make_config(family, "classification", adapter={"target_modules": "all-linear"}, model={"dtype": dtype})
    model = strong_adapter(config)
    draw = torch.Generator().manual_seed(3)
    vocabulary = len(model.base.tokenizer)

    def row(length: int) -> TokenRow:
        label = torch.randint(len(config.data.labels or ()), (), generator=draw)
        return TokenRow(torch.randint(vocabulary, (length,), generator=draw), label)

    lengths = torch.randint(3, config.data.max_length, (220,), generator=draw).tolist()
    rows = [*(row(length) for length in lengths), row(config.data.max_length)]
    clip, expected = 0.01, 220.0
    rule = {"clip": clip, "expected": expected}
    with_one = clipped_sum(model, config, rows, 4, **rule)
    without = clipped_sum(model, config, rows[:-1], 4, **rule)
    cut_otherwise = clipped_sum(model, config, rows[:-1], 16, **rule)
    assert expected * l2_norm(subtract(with_one, without)) <= clip * (1 + 1e-6)
    rounding = expected * l2_norm(subtract(cut_otherwise, without)) / clip
    assert 0.0 < rounding <= rounding_margin(model.module, expected)
