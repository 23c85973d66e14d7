"""Settings of the dependencies that every entry point makes before importing them: offline, silent, no telemetry."""

from __future__ import annotations

import os
import warnings

_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def quiet_dependencies() -> None:
    """Turn telemetry, update checks, advice and progress bars of the dependencies off, where not set otherwise."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # A hook of a frozen module that sees no gradient: expected with LoRA, where the embeddings do not train.
    warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
