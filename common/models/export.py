"""The trained adapter as a PEFT folder, which ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors.torch import save

from common.atomic import sync_folder, write_atomic
from common.config.run import RunConfig
from common.models.adapter import AdaptedModel
from common.sources import is_hub
from common.tensors import Tensors

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
ABOUT = "fedtune.json"


def export_adapter(model: AdaptedModel, adapter: Tensors, config: RunConfig, folder: Path) -> None:
    """Write an adapter folder; an older one of that name is replaced whole.

    It holds PEFT's two files and ``fedtune.json``: base model and its fingerprint, task, labels, prompt template and
    length, which a program that predicts needs and PEFT has no place for.

    Args:
        model: for the PEFT settings and the base's fingerprint.
        adapter: every adapter tensor by saved name, those that did not travel included.
        config: the run config.
        folder: where to write.
    """
    settings = {key: _plain(value) for key, value in model.settings.to_dict().items()}
    settings["inference_mode"] = True
    settings["base_model_name_or_path"] = config.model.source if is_hub(config.model.source) else None
    about = {
        "base_model": config.model.source if is_hub(config.model.source) else model.base.folder.name,
        "base_fingerprint": model.base.fingerprint,
        "task": config.data.task,
        "labels": config.data.labels,
        "prompt_template": config.data.prompt_template,
        "max_length": config.data.max_length,
    }
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    weights = {name: value.contiguous() for name, value in sorted(adapter.items())}
    write_atomic(building / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_atomic(building / SETTINGS, _json(settings))
    write_atomic(building / ABOUT, _json(about))
    building.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    sync_folder(folder.parent)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
