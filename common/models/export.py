"""The trained adapter as a PEFT folder: written, and loaded on its base model again."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.atomic import sync_folder, write_atomic
from common.config.adapter import AdapterConfig
from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.config.section import Section
from common.errors import ModelError
from common.factors import joined
from common.models.adapter import AdaptedModel, adapt
from common.models.base import choose_device, load_base
from common.sources import is_hub
from common.tensors import Tensors, manifest_of

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
ABOUT = "fedtune.json"


class About(Section):
    """What ``fedtune.json`` records: what a program that predicts needs, and PEFT has no place for."""

    base_model: str
    """Hub id of the base model, or the name of its folder."""
    base_fingerprint: str
    """See :func:`common.models.folder.weights_fingerprint`."""
    task: Literal["classification", "causal_lm"]
    """What it was tuned for."""
    labels: tuple[str | int, ...] | None = None
    """Labels in the order of the logits."""
    prompt_template: str = "{prompt}"
    """What the model was shown for a prompt."""
    max_length: int
    """Tokens that rows were cut to."""
    quantization: Literal["none", "4bit"] = "none"
    """``model.quantization`` of the run. It is loaded on the base as it is, which differs by the rounding."""
    pooling: Literal["family", "mean"] = "family"
    """``model.pooling``. An adapter with "mean" fits :class:`common.models.pooled.MeanPooledClassifier` alone."""
    adapter: AdapterConfig
    """The ``adapter`` section of the run; rank and alpha are those of the exported factors."""


def export_adapter(model: AdaptedModel, adapter: Tensors, config: RunConfig, folder: Path) -> AdapterConfig:
    """Write an adapter folder, an older one of that name replaced whole, and return what the adapter in it is.

    It holds PEFT's two files, which ``PeftModel.from_pretrained`` loads, and ``fedtune.json``, see :class:`About`. A
    correction to the base makes an adapter of higher rank, and a core goes into B: see :func:`common.factors.joined`.

    Args:
        model: for the PEFT settings and the base's fingerprint.
        adapter: every adapter tensor by saved name, those that did not travel and a correction included.
        config: the run config.
        folder: where to write.
    """
    settings = {key: _plain(value) for key, value in model.settings.to_dict().items()}
    weights, rank = joined(adapter)
    described = config.adapter
    if rank is not None and rank != settings.get("r"):
        alpha = settings["lora_alpha"] * rank / settings["r"]
        settings |= {"r": rank, "lora_alpha": alpha}
        described = AdapterConfig.model_validate(described.model_dump() | {"rank": rank, "alpha": alpha})
    settings["inference_mode"] = True
    settings["base_model_name_or_path"] = config.model.source if is_hub(config.model.source) else None
    about = About(
        base_model=config.model.source if is_hub(config.model.source) else model.base.folder.name,
        base_fingerprint=model.base.fingerprint,
        task=config.data.task,
        labels=config.data.labels,
        prompt_template=config.data.prompt_template,
        max_length=config.data.max_length,
        quantization=config.model.quantization,
        pooling=config.model.pooling,
        adapter=described,
    )
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    write_atomic(building / WEIGHTS, save(dict(sorted(weights.items())), metadata={"format": "pt"}))
    write_atomic(building / SETTINGS, _json(settings))
    write_atomic(building / ABOUT, _json(about.model_dump(mode="json")))
    building.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    sync_folder(folder.parent)
    return described


def load_adapter(folder: str | Path, source: str | Path, device: str = "auto") -> AdaptedModel:
    """Load an exported adapter on its base model, ready to predict: dropout off, whatever the pooling.

    Args:
        folder: an adapter folder that :func:`export_adapter` wrote.
        source: folder of the base model, or ``package:NAME/folder``.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        The model; ``logits`` and ``base.tokenizer`` are what a program that predicts needs.

    Raises:
        ModelError: a folder that is no exported adapter, or a base model that is not the adapter's.
    """
    folder = Path(folder)
    try:
        about = About.model_validate_json((folder / ABOUT).read_bytes())
        adapter = load_file(folder / WEIGHTS)
    except (OSError, ValidationError, SafetensorError) as error:
        raise ModelError(
            f"{folder} is no usable adapter folder ({str(error).splitlines()[0][:160]}); expected one that fedtune "
            "wrote. Name the folder 'adapter' of a run."
        ) from None
    if is_hub(str(source)):
        raise ModelError(f"base model {source} is a hub id; expected a local folder. Download it first.")
    chosen = choose_device(device)
    base = load_base(ModelConfig(source=str(source), pooling=about.pooling), about, chosen)
    if base.fingerprint != about.base_fingerprint:
        raise ModelError(
            f"base model {base.folder} has fingerprint {base.fingerprint[:12]} but the adapter was trained on "
            f"{about.base_model} ({about.base_fingerprint[:12]}); expected that one. Name its folder."
        )
    if about.quantization != "none":
        logger.warning("%s was trained and evaluated on a base of %s; here it is whole.", folder, about.quantization)
    model = adapt(base, about.adapter, about, chosen)
    if manifest_of(adapter) != manifest_of(model.parameters):
        raise ModelError(f"{folder / WEIGHTS} holds other tensors than {ABOUT} says. Export the adapter again.")
    model.load(adapter)
    model.module.eval()
    return model


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
