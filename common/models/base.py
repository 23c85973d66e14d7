"""Loading the frozen base model: safetensors only, no remote code, offline unless a hub id is given."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from common.config.data import DataConfig
from common.config.model import ModelConfig
from common.errors import ModelError
from common.models.families import Family, family_of
from common.sources import hub_id, is_hub, local_path

_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for folders that are broken in one way or another."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, not yet adapted.

    Attributes:
        module: the transformers model; all parameters frozen, dropout off.
        tokenizer: its fast tokenizer, with a padding token.
        family: facts about its architecture.
        fingerprint: SHA-256 of its weights, hexadecimal; see :func:`weights_fingerprint`.
        untrained: names of parameters that the checkpoint lacks (the head, as a rule).
        folder: where it was loaded from.
    """

    module: nn.Module
    tokenizer: Any
    family: Family
    fingerprint: str
    untrained: frozenset[str]
    folder: Path


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


def choose_device(name: str = "auto") -> torch.device:
    """Return the device to compute on: auto is cuda, then mps, then cpu.

    Raises:
        ModelError: for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one of ours")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"device {name!r} is not available; expected auto, cpu, cuda, cuda:N or mps.") from None
    return device


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype the base is held in on ``device``."""
    if config.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def load_base(config: ModelConfig, data: DataConfig, device: torch.device) -> BaseModel:
    """Load the base model for a task onto ``device``, frozen.

    Raises:
        ModelError: no safetensors weights, an unknown family, weights that do not fit the architecture.
    """
    folder = model_folder(config)
    hf_logging: Any = transformers.utils.logging
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    settings = _model_settings(folder, data)
    family = family_of(settings.model_type)
    if data.task not in family.tasks:
        raise ModelError(
            f"model type {settings.model_type!r} cannot be tuned for {data.task}; expected a model for it, or task "
            f"{family.tasks[0]!r}. Change data.task or the base model."
        )
    if family.positions is not None:
        key, reserved = family.positions
        limit = int(getattr(settings, key)) - reserved
        if data.max_length > limit:
            raise ModelError(
                f"data.max_length is {data.max_length} but the model has {limit} positions; expected at most as many. "
                "Lower data.max_length."
            )
    tokenizer = _load_tokenizer(folder)
    settings.pad_token_id = tokenizer.pad_token_id
    arguments: dict[str, Any] = {
        "config": settings, "use_safetensors": True, "trust_remote_code": False, "local_files_only": True,
        "dtype": compute_dtype(config, device), "output_loading_info": True, "ignore_mismatched_sizes": False,
    }  # fmt: skip
    if config.quantization == "4bit":
        arguments |= _four_bit(device)
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if data.task == "classification"
        else transformers.AutoModelForCausalLM
    )
    try:
        module, report = auto.from_pretrained(folder, **arguments)
    except _LOADING_ERRORS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.source: {folder} cannot be loaded for {data.task} ({first[:160]}); expected weights that fit "
            "config.json. Check the folder."
        ) from None
    untrained = frozenset(report["missing_keys"])
    _refuse_missing(untrained, family, data, folder)
    module.requires_grad_(requires_grad=False)
    if config.quantization == "none":
        module.to(device)
    if config.gradient_checkpointing:
        module.activation_checkpointing_enable({"use_reentrant": True})
        module.enable_input_require_grads()
    return BaseModel(module, tokenizer, family, weights_fingerprint(folder), untrained, folder)


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


def _model_settings(folder: Path, data: DataConfig) -> Any:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family_of(str(raw.get("model_type")))
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ModelError:
        raise
    except _LOADING_ERRORS as error:
        raise ModelError(f"model.source: {folder / 'config.json'} is broken; expected a model config.") from error
    for name, value in settings.to_dict().items():
        if isinstance(value, float) and ("drop" in name):
            setattr(settings, name, 0.0)
    settings.use_cache = False
    if data.task == "classification":
        labels = [str(label) for label in data.labels or ()]
        settings.num_labels = len(labels)
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: index for index, label in enumerate(labels)}
        settings.problem_type = "single_label_classification"
    return settings


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _LOADING_ERRORS as error:
        raise ModelError(f"model.source: {folder} has no usable tokenizer; expected tokenizer.json.") from error
    if not tokenizer.is_fast:
        raise ModelError(f"model.source: {folder} has only a slow tokenizer; expected tokenizer.json.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model.source: tokenizer in {folder} has neither padding nor end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _four_bit(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization '4bit' needs CUDA but the device is {device.type}; expected 'none' here. "
            "Run with --set model.quantization=none."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            "model.quantization '4bit' needs the package 'bitsandbytes'; expected it installed. "
            "Run: pip install 'fedtune[quantization]'."
        ) from None
    make: Any = transformers.BitsAndBytesConfig
    quantization = make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": quantization, "device_map": {"": device}}


def _refuse_missing(untrained: frozenset[str], family: Family, data: DataConfig, folder: Path) -> None:
    heads = family.heads if data.task == "classification" else ()
    foreign = sorted(name for name in untrained if not any(f".{head}." in f".{name}" for head in heads))
    if foreign:
        raise ModelError(
            f"model.source: weights in {folder} lack {len(foreign)} tensors ({foreign[0]}, ...); expected all but "
            "the head. Choose a checkpoint of the whole model."
        )
