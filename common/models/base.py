"""Loading the frozen base model: safetensors only, no remote code, offline unless a hub id is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from common.config.model import ModelConfig
from common.errors import ModelError
from common.models.attention import PACKED, register
from common.models.families import FAMILIES, Family, family_of
from common.models.folder import model_folder, weights_fingerprint
from common.models.pooled import MeanPooledClassifier

_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for folders that are broken in one way or another."""


_OF_FILES = ("use_safetensors", "local_files_only", "output_loading_info", "ignore_mismatched_sizes")
"""What only says how files are read."""


class Purpose(Protocol):
    """What a model is for: the part of the ``data`` section, or of an exported adapter's record, that shapes it."""

    @property
    def task(self) -> str:
        """A task of ``common.tasks.catalog``."""

    @property
    def labels(self) -> tuple[str | int, ...] | None:
        """The label set of a classification, in the order of the logits."""

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""


Load = Callable[[Any, Path, Purpose, dict[str, Any]], tuple[Any, frozenset[str]]]
"""From one of transformers' auto classes, a folder, a purpose and arguments to the model and the names it lacks."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, not yet adapted.

    Attributes:
        module: the transformers model, or our classifier on an encoder; all parameters frozen, dropout off.
        tokenizer: its fast tokenizer, with a padding token.
        family: facts about its architecture, as this model pools.
        fingerprint: SHA-256 of its weights, hexadecimal; see :func:`common.models.folder.weights_fingerprint`.
        untrained: names of parameters that the checkpoint lacks (the head, as a rule).
        folder: where it was loaded from.
    """

    module: nn.Module
    tokenizer: Any
    family: Family
    fingerprint: str
    untrained: frozenset[str]
    folder: Path


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
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's, for a device that it was not built with
        raise ModelError(f"device {name!r} is not available; expected auto, cpu, cuda, cuda:N or mps.") from None
    return device


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype the base is held in on ``device``."""
    if config.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def load_base(config: ModelConfig, data: Purpose, device: torch.device) -> BaseModel:
    """Load the base model for a task onto ``device``, frozen.

    On the meta device it has the shapes of its layers alone: no weights are read, and its fingerprint is empty.

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
    if config.pooling == "mean" and family.mean_pooling is None:
        offered = ", ".join(name for name, other in FAMILIES.items() if other.mean_pooling is not None)
        raise ModelError(
            f"model.pooling is 'mean' but the model type is {settings.model_type!r}; expected one of {offered}. "
            "Set model.pooling=family."
        )
    expect_positions(settings, family, data.max_length)
    tokenizer = load_tokenizer(folder)
    settings.pad_token_id = tokenizer.pad_token_id
    arguments: dict[str, Any] = {
        "config": settings, "use_safetensors": True, "trust_remote_code": False, "local_files_only": True,
        "dtype": compute_dtype(config, device), "output_loading_info": True, "ignore_mismatched_sizes": False,
    }  # fmt: skip
    if family.blocks is not None:
        register()
        arguments["attn_implementation"] = PACKED
    has_weights = device.type != "meta"
    load = _from_pretrained if has_weights else _shapes_alone
    if config.quantization == "4bit" and has_weights:
        arguments |= _four_bit(device, family.heads if data.task == "classification" else ())
    if config.pooling == "mean":
        family = family.mean_pooled()
        module, untrained = _load_pooled(folder, family, data, arguments, load)
    else:
        module, untrained = _load_classifier_or_lm(folder, family, data, arguments, load)
    module.requires_grad_(requires_grad=False)
    if config.quantization == "none" or not has_weights:
        module.to(device)
    if config.gradient_checkpointing:
        module.activation_checkpointing_enable({"use_reentrant": True})
        module.enable_input_require_grads()
    fingerprint = weights_fingerprint(folder) if has_weights else ""
    return BaseModel(module, tokenizer, family, fingerprint, untrained, folder)


def expect_positions(settings: Any, family: Family, max_length: int, virtual_tokens: int = 0) -> None:
    """Check that the model has positions for the longest row, and for the virtual tokens of a prompt before it.

    Raises:
        ModelError: if it has learnt position embeddings, and fewer.
    """
    if family.positions is None:
        return
    key, reserved = family.positions
    limit = int(getattr(settings, key)) - reserved
    if max_length + virtual_tokens > limit:
        prompt = f" and adapter.virtual_tokens {virtual_tokens}" if virtual_tokens else ""
        raise ModelError(
            f"data.max_length is {max_length}{prompt} but the model has {limit} positions; expected at most as many. "
            "Lower data.max_length."
        )


def _load_classifier_or_lm(
    folder: Path, family: Family, data: Purpose, arguments: dict[str, Any], load: Load
) -> tuple[Any, frozenset[str]]:
    """Load transformers' own model for the task; return it and the names of head parameters that are new."""
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if data.task == "classification"
        else transformers.AutoModelForCausalLM
    )
    module, missing = load(auto, folder, data, arguments)
    _refuse_missing(missing, family.heads if data.task == "classification" else (), folder)
    return module, missing


def _load_pooled(
    folder: Path, family: Family, data: Purpose, arguments: dict[str, Any], load: Load
) -> tuple[Any, frozenset[str]]:
    """Load the bare encoder under our classifier; a head in the checkpoint was trained on other features: not used."""
    encoder, missing = load(transformers.AutoModel, folder, data, arguments | dict(family.mean_pooling or {}))
    _refuse_missing(missing, (), folder)
    module = MeanPooledClassifier(encoder, len(data.labels or ()))
    return module, frozenset({"classifier.weight", "classifier.bias"})


def _from_pretrained(auto: Any, folder: Path, data: Purpose, arguments: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    """Load with one of transformers' auto classes; return the model and the names that the checkpoint lacks."""
    try:
        module, report = auto.from_pretrained(folder, **arguments)
    except _LOADING_ERRORS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.source: {folder} cannot be loaded for {data.task} ({first[:160]}); expected weights that fit "
            "config.json. Check the folder."
        ) from None
    return module, frozenset(report["missing_keys"])


def _shapes_alone(auto: Any, folder: Path, data: Purpose, arguments: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    """As :func:`_from_pretrained`, on the meta device and without weights."""
    kept = {key: value for key, value in arguments.items() if key not in (*_OF_FILES, "config")}
    try:
        with torch.device("meta"):
            return auto.from_config(arguments["config"], **kept), frozenset()
    except _LOADING_ERRORS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.source: {folder / 'config.json'} makes no model for {data.task} ({first[:160]}); expected a model "
            "config. Check the folder."
        ) from None


def _model_settings(folder: Path, data: Purpose) -> Any:
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


def load_tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer of a model folder, with a padding token.

    Raises:
        ModelError: if there is none.
    """
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


def _four_bit(device: torch.device, trained: tuple[str, ...]) -> dict[str, Any]:
    """Return what makes transformers quantise a model, but for layers of these names, which are trained."""
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
            "Run: pip install -e '.[quantization]'."
        ) from None
    make: Any = transformers.BitsAndBytesConfig
    quantization = make(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(trained) or None,
    )  # fmt: skip
    return {"quantization_config": quantization, "device_map": {"": device}}


def _refuse_missing(missing: frozenset[str], heads: tuple[str, ...], folder: Path) -> None:
    foreign = sorted(name for name in missing if not any(f".{head}." in f".{name}" for head in heads))
    if foreign:
        raise ModelError(
            f"model.source: weights in {folder} lack {len(foreign)} tensors ({foreign[0]}, ...); expected all but "
            "the head. Choose a checkpoint of the whole model."
        )
