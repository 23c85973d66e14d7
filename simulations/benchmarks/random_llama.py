"""A Llama of a given shape with random weights, and rows of random words; speed does not depend on the values."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

_SPECIAL = ("[PAD]", "[UNK]", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A model's shape and the rows that it is tuned on.

    Attributes:
        width: d.
        inner: width of the feed-forward layers.
        layers: blocks.
        heads: of queries.
        key_heads: of keys and values.
        words: of the vocabulary.
        tokens: most tokens of a row.
        sites: real sites.
        rows: of each of them.
        virtual: small sites.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    words: int
    tokens: int
    sites: int
    rows: int
    virtual: int


BILLION = Shape(2048, 8192, 16, 32, 8, 32_000, 512, sites=14, rows=128, virtual=200)
"""Llama 3.2 1B's, with fewer words: 1.1 thousand million parameters."""
TINY = Shape(32, 64, 2, 4, 2, 64, 32, sites=2, rows=12, virtual=6)


def save_llama(shape: Shape, folder: Path, device: str) -> Path:
    """Save a model of ``shape``, bfloat16, and its tokenizer in ``folder`` and return it."""
    words = [*_SPECIAL, *(f"w{number}" for number in range(shape.words - len(_SPECIAL)))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    make: Any = transformers.PreTrainedTokenizerFast
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    make(tokenizer_object=inner, **names).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, max_position_embeddings=shape.tokens,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(7)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def write_rows(shape: Shape, path: Path, sites: int, rows: int) -> Path:
    """Write prompts and completions whose lengths are log-normal, as those of real texts are."""
    draw = random.Random(5)  # noqa: S311
    with path.open("w", encoding="utf-8") as file:
        for index in range(sites * rows):
            length = min(shape.tokens - 2, max(6, round(draw.lognormvariate(0.0, 0.6) * shape.tokens / 3)))
            text = [f"w{draw.randrange(shape.words - len(_SPECIAL))}" for _ in range(length)]
            half = len(text) // 2
            row = {"prompt": " ".join(text[:half]) + " ", "completion": " ".join(text[half:])}
            file.write(json.dumps(row | {"site": f"site {index % sites:03d}"}) + "\n")
    return path
