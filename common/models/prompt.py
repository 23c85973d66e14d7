"""Prompt tuning (Lester et al. 2104.08691): trained vectors, "virtual tokens", put before the embeddings of a text.

PEFT makes the prompt and loads it again; the forward pass is ours, for three reasons. A language model's logits at the
virtual tokens are cut off. A decoder's classifier reads each row's last token, where transformers, given embeddings
instead of ids, reads the last column, padding included. And the prompt is looked up for every row, where PEFT looks
it up once for all, so that each example has a gradient of its own. On rows without padding the logits are PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.errors import ModelError
from common.models.base import BaseModel, Purpose, expect_positions
from common.models.packing import Forward
from common.randomness import torch_generator

PROMPT = "prompt_embeddings"
"""The name PEFT saves the virtual tokens' embeddings [P, d] by."""


def expect_promptable(base: BaseModel, virtual_tokens: int, data: Purpose) -> None:
    """Check that virtual tokens can stand before the rows.

    Raises:
        ModelError: a family whose rows are filled on the left, where padding would come between prompt and text; or
            fewer positions than virtual tokens and rows need.
    """
    if base.family.padding_side == "left":
        raise ModelError(
            f"adapter.kind is 'prompt' but rows of {base.folder.name} are padded on the left, between prompt and text; "
            "expected a family padded on the right. Set adapter.kind=lora."
        )
    settings: Any = base.module.config
    expect_positions(settings, base.family, data.max_length, virtual_tokens)


def prompt_forward(base: BaseModel, virtual_tokens: int, task: str) -> Forward:
    """Return how logits are computed with a prompt: [B, L] for a classification, [B, T, V] for a language model."""

    def language_model(module: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = module.get_base_model()(**_prompted(module, input_ids, attention_mask)).logits
        return logits[:, virtual_tokens:]

    def encoder(module: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = module.get_base_model()(**_prompted(module, input_ids, attention_mask)).logits
        return logits

    def decoder(module: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        classifier = module.get_base_model()
        states = _backbone(classifier)(**_prompted(module, input_ids, attention_mask)).last_hidden_state
        last = virtual_tokens + attention_mask.sum(dim=1) - 1
        logits: Tensor = classifier.score(states[torch.arange(len(states), device=states.device), last])
        return logits

    if task != "classification":
        return language_model
    return decoder if base.family.is_decoder else encoder


def _backbone(classifier: Any) -> Any:
    return getattr(classifier, classifier.base_model_prefix)


def _prompted(module: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Embeddings [B, P + T, d] and mask [B, P + T] of prompt and text."""
    text = module.word_embeddings(input_ids)
    adapter = module.active_adapter
    tokens = module.prompt_tokens[adapter].to(input_ids.device).expand(len(input_ids), -1)
    prompt = module.prompt_encoder[adapter].embedding(tokens).to(text.dtype)
    seen = attention_mask.new_ones(prompt.shape[:2])
    return {
        "inputs_embeds": torch.cat([prompt, text], dim=1),
        "attention_mask": torch.cat([seen, attention_mask], dim=1),
    }


def initial_prompt(base: BaseModel, virtual_tokens: int, seed: int) -> Tensor:
    """Return the embeddings of randomly drawn vocabulary entries, special tokens left out (Lester et al., section 3.2).

    They are rounded to bfloat16, so that a base held in bfloat16 gives the same values as one held in float32.

    Returns:
        [P, d], float32, on the CPU; a function of the base's weights and ``seed``.
    """
    module: Any = base.module
    table: Tensor = module.get_input_embeddings().weight
    special = set(base.tokenizer.all_special_ids)
    words = torch.tensor([index for index in range(min(len(base.tokenizer), len(table))) if index not in special])
    drawn = torch.randint(len(words), (virtual_tokens,), generator=torch_generator(seed, "initial-adapter", PROMPT))
    return table.detach()[words[drawn].to(table.device)].to("cpu", torch.bfloat16).float()
