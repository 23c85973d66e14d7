"""What a LoRA layer computes besides W x + (α/r) B A x: a correction to the frozen base, or a core between the factors.

A correction (``fixed_B fixed_A``, see ``common.factors``) is a frozen path of its own next to the layer,
W x + (α/r) (B A x + fixed_B fixed_A x), in float32; the base weight is never rewritten, so that a quantised base stays
what it is and nothing is lost by rounding. A core R [r, r] stands between A and B: (α/r) B R A x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.factors import FIXED_A, FIXED_B, A, Factors
from common.randomness import stream_seed

CORE_OVERSAMPLING, CORE_ITERATIONS = 8, 8
"""Further columns and power iterations of the randomised SVD that finds a core's subspaces (0909.4061)."""
CORE_GRID = 2.0**-12
"""To whose multiples a core's A and B are rounded: on another CPU LAPACK gives other last bits, float32 shows it."""


class Corrections:
    """The corrections of a model's LoRA layers, one path each; none until :meth:`set`.

    Args:
        module: the PEFT model.
        adapter: PEFT's name of the adapter.
    """

    def __init__(self, module: nn.Module, adapter: str) -> None:
        self._paths: dict[str, Factors] = {}
        self._layers = {name: layer for name, layer in module.named_modules() if _has_factors(layer, adapter)}
        for name, layer in self._layers.items():
            scale = float(layer.scaling[adapter])
            layer.register_forward_hook(self._adding(name, scale))

    @property
    def layers(self) -> frozenset[str]:
        """Layers that have a correction now."""
        return frozenset(self._paths)

    def set(self, adapter: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the corrections that are in ``adapter``, and no others.

        Raises:
            ModelError: for a layer that the model does not have.
        """
        self._paths = {}
        for name in adapter:
            if not name.endswith(FIXED_A):
                continue
            layer = name.removesuffix(FIXED_A)
            if layer not in self._layers:
                raise ModelError(f"a correction is for layer {layer}, which has no factors; expected one that has.")
            b, a = (adapter[layer + end].to(device, torch.float32) for end in (FIXED_B, FIXED_A))
            self._paths[layer] = Factors(b, a)

    def _adding(self, name: str, scale: float) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            path = self._paths.get(name)
            if path is None:
                return output
            added = functional.linear(functional.linear(inputs[0].float(), path.a), path.b)
            return (output.float() + scale * added).to(output.dtype)

        return add


def _has_factors(layer: nn.Module, adapter: str) -> bool:
    factors = getattr(layer, "lora_A", None)
    return isinstance(factors, nn.ModuleDict) and adapter in factors


class CoredFactor(nn.Module):
    """A factor A with a core R behind it: x ↦ R A x. Stands where PEFT has the linear layer of A.

    Args:
        outer: the layer of A [r, n].
    """

    def __init__(self, outer: nn.Linear) -> None:
        super().__init__()
        self.outer = outer
        self.core = nn.Linear(outer.out_features, outer.out_features, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        """A, for whoever asks for the dtype."""
        weight: nn.Parameter = self.outer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return R A x: [..., r]."""
        found: Tensor = self.core(self.outer(x))
        return found


def set_scale(module: nn.Module, adapter: str, scale: float) -> None:
    """Scale the product BA of every LoRA layer by ``scale``, whatever rank its factors were made with, in place."""
    for layer in [layer for layer in module.modules() if _has_factors(layer, adapter)]:
        scaling: Any = layer.scaling
        scaling[adapter] = scale


def add_cores(module: nn.Module, adapter: str) -> None:
    """Put a core between the factors of every LoRA layer, in place."""
    for layer in [layer for layer in module.modules() if _has_factors(layer, adapter)]:
        factors: Any = layer.lora_A
        factors[adapter] = CoredFactor(factors[adapter])


def spectral_start(module: nn.Module, name: str, rank: int, seed: int) -> Tensor:
    """Return a fixed factor of a layer with a core: the leading singular vectors of the frozen weight W [m, n].

    B has the r leading left ones as columns and A the right ones as rows (LoRA-XS, 2405.17604), from a randomised SVD
    keyed by the seed, so that every process derives the same. LoRA-SB (2411.19557) takes those of a gradient instead,
    which is a function of private records: it would have to be charged. The weight is rounded to bfloat16 first, so
    that a base held in bfloat16 gives the same factors as one held in float32.

    Args:
        module: the PEFT model.
        name: of the factor, as saved.
        rank: r.
        seed: of the run.

    Returns:
        A [r, n] or B [m, r], float32.

    Raises:
        ModelError: for a rank above the layer's smaller side, which has no more singular vectors.
    """
    layer: Any = module.get_submodule(name.rpartition(".lora_")[0])
    weight = layer.get_base_layer().weight.detach().to("cpu", torch.bfloat16).double()
    if rank > min(weight.shape):
        raise ModelError(
            f"adapter.rank {rank} is above {min(weight.shape)}, the smaller side of layer "
            f"{name.rpartition('.lora_')[0]}; expected at most that under aggregation.method 'fed_sb'. Lower the rank."
        )
    weight = weight.T if layer.fan_in_fan_out else weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "core", name.rpartition(".lora_")[0]) & (2**63 - 1))
        columns = min(rank + CORE_OVERSAMPLING, *weight.shape)
        u, _, v = torch.svd_lowrank(weight, q=columns, niter=CORE_ITERATIONS)
    u, v = u[:, :rank], v[:, :rank]
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True)))
    found = (v * signs).T if name.endswith(A) else u * signs
    return (torch.round(found / CORE_GRID) * CORE_GRID).float().contiguous()
