"""Tiny base models of every family, built from config with a word-level tokenizer, saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = [
    *"the pulse chest beat rash itch mole knee hip ankle hurts since day and night what about rest call on".split(),  # noqa: SIM905
    *"is it my user assistant question answer".split(),  # noqa: SIM905
    *map(str, range(20)),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)

_SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_DECODER = _SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 3}

FAMILIES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, "Bert", _SMALL | {"max_position_embeddings": 64}),
    "roberta": (transformers.RobertaConfig, "Roberta", _SMALL | {"max_position_embeddings": 64, "pad_token_id": 0}),
    "distilbert": (
        transformers.DistilBertConfig,
        "DistilBert",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    "xlnet": (transformers.XLNetConfig, "XLNet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "gpt2": (transformers.GPT2Config, "GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama": (transformers.LlamaConfig, "Llama", _DECODER),
    "mistral": (transformers.MistralConfig, "Mistral", _DECODER | {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, "Qwen2", _DECODER),
    "qwen3": (transformers.Qwen3Config, "Qwen3", _DECODER | {"head_dim": 8}),
}
CAUSAL = {"gpt2", "llama", "mistral", "qwen2", "qwen3"}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of some fifty words."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", bos_token="[CLS]"
    )


def save_tiny_model(family: str, folder: Path) -> Path:
    """Build a model of ``family`` with seeded weights and save it with its tokenizer."""
    make_config, name, settings = FAMILIES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = make_config(vocab_size=len(tokenizer), **settings)
    config.pad_token_id = 0
    config.initializer_range = 0.3  # large enough that a random encoder tells words apart
    torch.manual_seed(7)
    kind = {"causal": "ForCausalLM", "base": "Model"}["causal" if family in CAUSAL else "base"]
    if family == "gpt2":
        kind = "LMHeadModel"
    getattr(transformers, name + kind)(config).save_pretrained(folder)
    return folder
