"""An encoder for what a run does not train: sentence vectors that texts are clustered by."""

from __future__ import annotations

import json
from typing import Any

import transformers

from common.config.model import ModelConfig
from common.errors import ModelError
from common.models.base import load_tokenizer
from common.models.families import family_of
from common.models.folder import model_folder


def load_encoder(source: str) -> tuple[Any, Any]:
    """Return a bare encoder, in evaluation mode in float32 on the CPU, and its tokenizer.

    Raises:
        ModelError: if it cannot be loaded, or is a decoder, whose mean-pooled states say little of a text.
    """
    folder = model_folder(ModelConfig(source=source))
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
        family = family_of(kind)
        if family.mean_pooling is None:
            raise ModelError(
                f"data.partition.encoder: {folder} is a {kind!r}; expected an encoder. Name one, or leave the key out "
                "for TF-IDF."
            )
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        load: Any = transformers.AutoModel.from_pretrained
        module = load(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"data.partition.encoder: {folder} cannot be loaded ({type(error).__name__}); expected an encoder's folder."
        ) from None
    return module.float().eval(), load_tokenizer(folder)
