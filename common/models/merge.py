"""An exported adapter folded into its base model: one folder that any program for the base model loads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.models.export import load_adapter


def merge_adapter(adapter: Path, source: str | Path, folder: Path, device: str = "auto") -> None:
    """Write the base model with an adapter's products added to its weights, as safetensors with its tokenizer.

    Logits differ from those of base and adapter apart by the rounding of one sum in the base's precision.

    Args:
        adapter: an adapter folder that :func:`common.models.export.export_adapter` wrote.
        source: folder of the base model, or ``package:NAME/folder``.
        folder: where to write; new or empty.
        device: where to compute.

    Raises:
        ModelError: for a folder in use, an adapter that is no LoRA one, one with a head that no class of transformers
            has, or one with factors on a weight that two layers share.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; expected a new folder. Choose another.")
    model = load_adapter(adapter, source, device)
    wrapped: Any = model.module
    why = None
    if not hasattr(wrapped, "merge_and_unload"):
        why = "it is a prompt"
    elif not hasattr(wrapped.get_base_model(), "save_pretrained"):
        why = "it pools by the mean, which no model class of transformers does"
    if why is not None:
        raise ModelError(
            f"{adapter} cannot be merged: {why}; expected LoRA factors with model.pooling 'family'. Use the adapter "
            "folder."
        )
    shared = _shared(wrapped)
    if shared is not None:
        raise ModelError(
            f"{adapter} cannot be merged: it has factors on {shared}, whose weight another layer shares, and merging "
            "would change that too; expected factors on other layers. Use the adapter folder."
        )
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder, safe_serialization=True)
    model.base.tokenizer.save_pretrained(folder)


def _shared(module: Any) -> str | None:
    """Return the name of a layer with factors whose weight is another layer's too; None if there is none."""
    owners = Counter(weight.data_ptr() for _, weight in module.named_parameters(remove_duplicate=False))
    for name, layer in module.named_modules():
        if hasattr(layer, "get_base_layer") and hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight
            if weight.numel() and owners[weight.data_ptr()] > 1:
                return str(name).rpartition(".")[2]
    return None
