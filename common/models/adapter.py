"""The adapter: LoRA factors or a prompt, and head, on a frozen base: plain tensors under the names PEFT saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from common.config.adapter import AdapterConfig
from common.errors import ModelError
from common.factors import A, B, R, is_fixed
from common.models.base import BaseModel, Purpose
from common.models.narrowing import Columns, first_column, last_column
from common.models.packing import Forward, PackedForward, Start, plain_forward
from common.models.pooled import MeanPooledClassifier
from common.models.prompt import PROMPT, expect_promptable, initial_prompt, prompt_forward
from common.models.side_paths import Corrections, add_cores, set_scale, spectral_start
from common.randomness import normal, torch_generator, uniform
from common.tensors import Tensors

_ADAPTER = "default"


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A base model with one adapter whose values are swapped in and out.

    Attributes:
        base: the base model; its module is wrapped by PEFT.
        module: the PEFT model; call it with input_ids [B, T] and attention_mask [B, T].
        parameters: every adapter parameter by its saved name, sorted; float32.
        settings: the PEFT config, for the export.
        device: where it computes.
        forward: how ``module`` gives logits.
        corrections: to the frozen base, beside its weights.
    """

    base: BaseModel
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    settings: Any
    device: torch.device
    forward: Forward
    corrections: Corrections

    @property
    def packs(self) -> bool:
        """Whether it computes on tokens that exist; else on padded rows."""
        return isinstance(self.forward, PackedForward)

    def load(self, adapter: Mapping[str, Tensor]) -> None:
        """Copy the values of ``adapter`` into the model; names not in it keep their values.

        Factors take the rank of what is loaded, whatever it was; the scale α/r stays that of the run. A whole adapter
        replaces the correction to the base too: one without a correction has none.
        """
        if adapter.keys() >= self.parameters.keys():
            self.corrections.set(adapter, self.device)
        with torch.no_grad():
            for name, value in adapter.items():
                if is_fixed(name):
                    continue
                parameter = self.parameters[name]
                if parameter.shape != value.shape and name.endswith((A, B)):
                    parameter.grad = None
                    parameter.data = parameter.new_empty(value.shape)
                parameter.copy_(value)

    def state(self) -> Tensors:
        """Return a copy of the adapter on the CPU, float32."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def train_only(self, names: frozenset[str]) -> dict[str, nn.Parameter]:
        """Let exactly ``names`` take gradients and return them, in order of name."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        return {name: parameter for name, parameter in self.parameters.items() if name in names}

    @property
    def num_blocks(self) -> int:
        """How many transformer blocks a model that packs has; else 0."""
        return self.forward.num_blocks if isinstance(self.forward, PackedForward) else 0

    def states(self, input_ids: Tensor, attention_mask: Tensor, depth: int) -> Tensor:
        """Return what enters block ``depth`` of a model that packs: [B, T] token ids and mask to [1, N, d].

        Raises:
            ModelError: for a model that computes on padded rows.
        """
        if not isinstance(self.forward, PackedForward):
            raise ModelError("states were asked of a model that pads its rows; expected one that packs them.")
        return self.forward.states(self.module, input_ids, attention_mask, depth)

    def logits(self, input_ids: Tensor, attention_mask: Tensor, start: Start | None = None) -> Tensor:
        """Run the model: [B, T] token ids and mask to logits, [B, labels] or [B, T, V], float32.

        With ``start``, which a model that packs takes alone, from there on.

        The base computes in the precision it is held in, the adapter in float32 (save for XLNet, which DP refuses): its
        gradient is then a float32 product too, the same whether summed over a batch or captured for each example.
        """
        if start is not None and isinstance(self.forward, PackedForward):
            return self.forward(self.module, input_ids, attention_mask, start).float()
        return self.forward(self.module, input_ids, attention_mask).float()


def _autocast_forward(module: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As :func:`plain_forward`; on a bfloat16 base the adapter computes in bfloat16 too. Never under DP."""
    halved = any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=halved):
        return plain_forward(module, input_ids, attention_mask)


def _base_forward(base: BaseModel, data: Purpose) -> Forward:
    """How the model runs without a prompt: packed where its family and checkpointing allow."""
    if base.family.needs_autocast:
        return _autocast_forward
    recomputes = any(getattr(layer, "gradient_checkpointing", False) for layer in base.module.modules())
    if base.family.blocks is None or recomputes:
        return plain_forward
    language_model = data.task == "causal_lm"
    reads: Columns | None = None
    if not language_model and not isinstance(base.module, MeanPooledClassifier):
        reads = last_column(base.tokenizer.pad_token_id) if base.family.is_decoder else first_column
    return PackedForward(base.module, base.family.blocks, language_model=language_model, reads=reads)


def adapt(
    base: BaseModel,
    adapter: AdapterConfig,
    data: Purpose,
    device: torch.device,
    *,
    core: bool = False,
    rank: int | None = None,
) -> AdaptedModel:
    """Put LoRA factors or a prompt, and a trainable head, on ``base`` (in place).

    Args:
        base: the base model.
        adapter: what to put on it.
        data: what it is for.
        device: where it computes.
        core: whether a core stands between the factors (Fed-SB).
        rank: that LoRA factors are made with; the adapter's if not given. The scale α/r stays the adapter's.

    Raises:
        ModelError: for target modules that the model does not have, or a prompt that it has no place for.
    """
    heads = list(base.family.heads) if data.task == "classification" else []
    targets = base.family.targets if adapter.target_modules == "auto" else adapter.target_modules
    forward = _base_forward(base, data)
    if adapter.kind == "prompt":
        expect_promptable(base, adapter.virtual_tokens, data)
        settings = _prompt_settings(base, adapter, data, heads)
        forward = prompt_forward(base, adapter.virtual_tokens, data.task)
    else:
        settings = _lora_settings(base, adapter, data, heads, targets, rank or adapter.rank)
    try:
        module = peft.get_peft_model(base.module, settings, adapter_name=_ADAPTER)
    except (ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"adapter.target_modules {targets!r} do not fit the model ({first[:120]}); expected names of its "
            "linear layers. Try 'auto' or 'all-linear'."
        ) from None
    if adapter.kind == "lora":
        set_scale(module, _ADAPTER, adapter.alpha / adapter.rank)
    if core:
        add_cores(module, _ADAPTER)
    module.to(device)
    parameters = {}
    for name, parameter in module.named_parameters():
        if f".{_ADAPTER}." in name:
            parameter.data = parameter.data.float()
            parameters[_saved_name(name)] = parameter
    for name, layer in module.named_modules():
        if name.endswith(f".modules_to_save.{_ADAPTER}"):
            layer.register_forward_pre_hook(_in_float32)
    _expect_all_kept(module, parameters, () if adapter.kind == "prompt" else targets)
    corrections = Corrections(module, _ADAPTER)
    adapted = AdaptedModel(base, module, dict(sorted(parameters.items())), settings, device, forward, corrections)
    adapted.train_only(frozenset(parameters))
    return adapted


def _in_float32(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hand a head its input in its own precision, as PEFT does for LoRA factors, on a base held in bfloat16."""
    return tuple(value.float() for value in inputs)


def _lora_settings(
    base: BaseModel, adapter: AdapterConfig, data: Purpose, heads: list[str], targets: str | tuple[str, ...], rank: int
) -> Any:
    model_config: Any = base.module.config
    make: Any = peft.LoraConfig
    return make(
        task_type=_task_type(data),
        r=rank if adapter.kind == "lora" else 1,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=heads or None,
        fan_in_fan_out=model_config.model_type == "gpt2",
        init_lora_weights=True,
        base_model_name_or_path=None,
    )


def _prompt_settings(base: BaseModel, adapter: AdapterConfig, data: Purpose, heads: list[str]) -> Any:
    model_config: Any = base.module.config
    make: Any = peft.PromptTuningConfig
    return make(
        task_type=_task_type(data),
        num_virtual_tokens=adapter.virtual_tokens,
        token_dim=model_config.hidden_size,
        num_layers=model_config.num_hidden_layers,
        num_attention_heads=model_config.num_attention_heads,
        num_transformer_submodules=1,
        modules_to_save=heads or None,
        base_model_name_or_path=None,
    )


def _task_type(data: Purpose) -> Any:
    return peft.TaskType.SEQ_CLS if data.task == "classification" else peft.TaskType.CAUSAL_LM


def _saved_name(name: str) -> str:
    """The name that PEFT saves a parameter by, from the one it has in the model."""
    if name == f"prompt_encoder.{_ADAPTER}.embedding.weight":
        return PROMPT
    name = name.replace(f".lora_A.{_ADAPTER}.core.", ".lora_R.").replace(f".lora_A.{_ADAPTER}.outer.", ".lora_A.")
    return name.replace(f".modules_to_save.{_ADAPTER}.", ".").replace(f".{_ADAPTER}.", ".")


def _expect_all_kept(module: nn.Module, parameters: Mapping[str, nn.Parameter], targets: str | tuple[str, ...]) -> None:
    """Check that every factor PEFT made is one we train and send, and that every named target got factors."""
    kept = {id(parameter) for parameter in parameters.values()}
    foreign = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in kept]
    if foreign or not parameters:
        what = foreign[0] if foreign else "nothing to train"
        raise ModelError(f"adapter.target_modules {targets!r} gives {what}; expected linear layers. Name those.")
    names = () if isinstance(targets, str) else targets
    missed = [target for target in names if not any(f".{target}.lora_" in f".{name}" for name in parameters)]
    if missed:
        raise ModelError(f"adapter.target_modules has {missed[0]!r}, which names no linear layer; expected one.")


def initial_adapter(model: AdaptedModel, seed: int, rank: int | None = None) -> Tensors:
    """Return the adapter a run starts from, the same in every process and on every CPU for one seed.

    A is uniform as in Kaiming initialisation with a = √5 and B is zero, so that BA = 0 (Hu et al. 2106.09685);
    a head keeps pretrained values, and a new one is normal with the model's ``initializer_range``, biases zero;
    a prompt starts at entries of the vocabulary, see :func:`common.models.prompt.initial_prompt`. With a core, A and B
    are singular vectors of the frozen weight and the core is zero, see :func:`common.models.side_paths.spectral_start`.

    A of a lower rank is the first rows of A of a higher one, to the bit.

    Args:
        model: the adapted model.
        seed: of the run.
        rank: of the factors A and B; that which the model was made with if not given.

    Returns:
        Float32 CPU tensors by saved name.
    """
    spread = float(getattr(model.base.module.config, "initializer_range", 0.02) or 0.02)
    inside = "base_model." if PROMPT in model.parameters else "base_model.model."
    untrained = {inside + name for name in model.base.untrained}
    start: Tensors = {}
    for name, parameter in model.parameters.items():
        generator = torch_generator(seed, "initial-adapter", name)
        value = torch.zeros(parameter.shape, dtype=torch.float32)
        if name == PROMPT:
            value = initial_prompt(model.base, len(parameter), seed)
        elif name.endswith((A, B)) and name[: -len(A)] + R in model.parameters:
            value = spectral_start(model.module, name, model.settings.r, seed)
        elif name.endswith(A):
            value = initial_a(rank or model.settings.r, parameter.shape[1], generator)
        elif name.endswith(B):
            value = torch.zeros(len(parameter), rank or model.settings.r)
        elif not name.endswith(R):
            if name not in untrained:
                value = _pretrained(model, name)
            elif parameter.dim() > 1:
                value = normal(parameter.shape, spread, generator)
        start[name] = value
    return start


def initial_a(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """Return a factor A [rank, width] to start from: uniform within ±1/√width."""
    return uniform(rank, width, 1.0 / math.sqrt(width), generator)


def fresh_factors(adapter: Mapping[str, Tensor], seed: int, number: int) -> Tensors:
    """Return ``adapter`` with a new A and B = 0 in every layer, for methods whose factors start afresh every round.

    Args:
        adapter: the whole adapter.
        seed: of the run.
        number: of the round; in the first one A is the initial adapter's.
    """
    fresh = dict(adapter)
    for name, value in adapter.items():
        if name.endswith(A) and number > 1:
            fresh[name] = initial_a(len(value), value.shape[1], torch_generator(seed, "initial-adapter", name, number))
        elif name.endswith(B):
            fresh[name] = torch.zeros_like(value)
    return fresh


def _pretrained(model: AdaptedModel, name: str) -> Tensor:
    """The checkpoint's own value of a head parameter, which PEFT keeps beside the trained copy.

    It is rounded to bfloat16, so that a base held in bfloat16 starts from the same values as one held in float32.
    """
    head = next(head for head in model.base.family.heads if f".{head}." in name)
    before, _, after = name.partition(f".{head}.")
    original = model.module.get_parameter(f"{before}.{head}.original_module.{after}")
    return original.detach().to("cpu", torch.bfloat16).float()
