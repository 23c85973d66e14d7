"""What differs between model families: where the factors go, what the head is called, how rows are padded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.errors import ModelError


@dataclass(frozen=True)
class Blocks:
    """A family's transformer blocks, for the packed forward pass.

    Attributes:
        path: name that the list of them ends on in the model.
        single: layers of a block that work token by token, where the last block of a classifier needs no more than the
            token that its head reads; keys and values are needed of all.
        onwards: a layer from whose input on a block does nothing else: all it is given is cut to that token for good.
    """

    path: str
    single: tuple[str, ...]
    onwards: str | None = None


@dataclass(frozen=True)
class Family:
    """Facts about one Hugging Face ``model_type``.

    Attributes:
        targets: names of the layers that get LoRA factors with ``target_modules: auto``.
        heads: names of the modules of the classification head; trained whole.
        tasks: what it can be tuned for. An encoder sees the whole text, so it is no causal language model.
        positions: for learnt position embeddings, the config key of their number and how many of them are reserved.
        padding_side: where short rows are filled. XLNet summarises the last position, so it is filled on the left.
        batch_first: False where the encoder works on [T, B, d]; per-example gradients of Opacus do not fit then.
        mean_pooling: what loads the bare encoder without a pooling layer of its own, for ``model.pooling: mean``; None
            where that is not offered.
        needs_autocast: whether its code mixes precisions, so that a base held in bfloat16 runs under autocast alone.
        blocks: its transformer blocks; None where the family computes on padded rows.
    """

    targets: tuple[str, ...]
    heads: tuple[str, ...]
    tasks: tuple[str, ...] = ("classification",)
    positions: tuple[str, int] | None = None
    padding_side: str = "right"
    batch_first: bool = True
    mean_pooling: Mapping[str, bool] | None = None
    needs_autocast: bool = False
    blocks: Blocks | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether a token sees only those before it."""
        return "causal_lm" in self.tasks

    def mean_pooled(self) -> Family:
        """Return the family as :class:`common.models.pooled.MeanPooledClassifier` makes it: with one linear head."""
        return replace(self, heads=("classifier",))


_POSITIONS = "max_position_embeddings"
_DECODER = Family(
    targets=("q_proj", "v_proj"),
    heads=("score",),
    tasks=("classification", "causal_lm"),
    blocks=Blocks("layers", single=("self_attn.q_proj", "self_attn.o_proj", "mlp")),
)
_ENCODER = Family(
    targets=("query", "value"),
    heads=("classifier",),
    mean_pooling={"add_pooling_layer": False},
    blocks=Blocks("encoder.layer", single=("attention.self.query",), onwards="attention.output"),
)

FAMILIES: dict[str, Family] = {
    "bert": replace(_ENCODER, positions=(_POSITIONS, 0)),
    "roberta": replace(_ENCODER, positions=(_POSITIONS, 2)),
    "xlm-roberta": replace(_ENCODER, positions=(_POSITIONS, 2)),
    "distilbert": Family(
        targets=("q_lin", "v_lin"),
        heads=("pre_classifier", "classifier"),
        positions=(_POSITIONS, 0),
        mean_pooling={},
        blocks=Blocks("transformer.layer", single=("attention.q_lin", "attention.out_lin"), onwards="sa_layer_norm"),
    ),
    "xlnet": Family(
        targets=("ff.layer_1", "ff.layer_2"),
        heads=("sequence_summary.summary", "logits_proj"),
        padding_side="left",
        batch_first=False,
        needs_autocast=True,
    ),
    "gpt2": Family(
        targets=("c_attn",),
        heads=("score",),
        tasks=("classification", "causal_lm"),
        positions=("n_positions", 0),
        blocks=Blocks("h", single=("attn.c_proj", "mlp")),
    ),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}


def family_of(model_type: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        ModelError: for a family that has not been tested.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}. "
            "Choose another base model."
        )
    return FAMILIES[model_type]
