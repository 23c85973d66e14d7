"""The folder of a base model: found or fetched, checked for safe weights, fingerprinted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from common.config.model import ModelConfig
from common.errors import ModelError
from common.sources import hub_id, is_hub, local_path

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_folder(config: ModelConfig) -> Path:
    """Return the local folder of the base model, fetching a hub snapshot where the source is a hub id.

    Raises:
        ModelError: a folder that is missing or lacks config or safetensors weights.
    """
    folder = _snapshot(config) if is_hub(config.source) else local_path(config.source, "model.source")
    try:
        present = folder.is_dir()
        readable = present and os.access(folder, os.R_OK | os.X_OK)
    except (OSError, ValueError):
        raise ModelError(f"model.source: {str(folder)[:200]!r} is no usable path; expected a folder.") from None
    if present and not readable:
        raise ModelError(f"model.source: {folder} cannot be read (permission denied); expected a readable folder.")
    if not present:
        what = "is a file" if folder.is_file() else "does not exist"
        raise ModelError(f"model.source: {folder} {what}; expected a folder with a base model. Check the path.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.source: {folder} has no config.json; expected a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
        if pickled:
            raise ModelError(
                f"model.source: {folder} has only pickled weights ({pickled[0]}), which can run code; expected "
                "*.safetensors. Convert them with save_pretrained on a machine you trust."
            )
        raise ModelError(f"model.source: {folder} has no weights; expected *.safetensors. Copy them there.")
    return folder


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of the weights: of the one safetensors file, or over names and digests of the shards in order."""
    files = sorted(folder.glob("*.safetensors"))
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in digests).encode()).hexdigest()


def _snapshot(config: ModelConfig) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
    ]
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id(config.source), revision=config.revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.source: {config.source} at {config.revision} cannot be fetched ({type(error).__name__}); "
            "expected a reachable hub or a cached copy. Download it first, or name a local folder."
        ) from None
