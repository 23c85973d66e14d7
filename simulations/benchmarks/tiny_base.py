"""A tiny BERT with seeded weights and a word-level tokenizer, where all but the base model shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

TINY_LABELS = ("heart", "skin", "bones")
TINY_WORDS = ("pulse", "chest", "beat", "rash", "itch", "mole", "knee", "hip", "ankle")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_OTHERS = ("since", "day", "and", "again", "on")


def save_tiny_base(folder: Path) -> Path:
    """Save the model and its tokenizer in ``folder`` and return it."""
    words = [*_SPECIAL, *TINY_LABELS, *TINY_WORDS, *_OTHERS, *map(str, range(100))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    make: Any = transformers.PreTrainedTokenizerFast
    make(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)  # noqa: S106
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    transformers.BertModel(config).save_pretrained(folder)
    return folder
