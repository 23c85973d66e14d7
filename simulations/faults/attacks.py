"""What hostile sites send: the attacks by the name they have in the run config.

An attack gets the bytes that an honest site would send and returns the bytes that travel instead, so that what meets it
is the coordinator's own admission. Those of :data:`ATTACKS` change the reply to a train request, those of
:data:`DESCRIPTION_ATTACKS` what a site says of itself before the first round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from common.codecs.codec import decode, encode, told_manifest
from common.codecs.compression import compress, decompress
from common.codecs.layout import metadata_of
from common.codecs.packing import Packing
from common.codecs.refusal import wire_error
from common.config.simulation import AttackName
from common.tensors import Tensors, l2_norm

HUGE_NORM = 1e12
LARGEST_DECLARATION = 10**9
"""Rows that a description can declare at most; a larger number is refused with it."""
_SUBNORMAL = 1e-40
_OTHER_DTYPE = {
    torch.float32: torch.float16, torch.bfloat16: torch.float16, torch.int8: torch.uint8, torch.uint8: torch.int8,
    torch.uint16: torch.int16, torch.uint32: torch.int32,
}  # fmt: skip
"""Of no more bytes, so that the size gives nothing away."""
_PADDING = 65_536


@dataclass(frozen=True)
class Answer:
    """What a site sends.

    Attributes:
        header: JSON.
        payload: the packed update; b"" where there is none.
    """

    header: bytes
    payload: bytes


@dataclass(frozen=True)
class Scene:
    """What a hostile site knows besides its honest answer.

    Attributes:
        packing: of updates in this run.
        draw: its own randomness, keyed by (seed, attack, round, site).
        older: its newest answer of an earlier round; None where there is none.
    """

    packing: Packing
    draw: np.random.Generator
    older: Answer | None = None


Attack = Callable[[Answer, Scene], list[Answer]]


def _on_update(change: Callable[[Tensors, Scene], Tensors]) -> Attack:
    """Return the attack that replaces the tensors of the update and packs them as the codec does."""

    def attack(honest: Answer, scene: Scene) -> list[Answer]:
        changed = change(_unpacked(honest, scene), scene)
        rounding = torch.Generator().manual_seed(int(scene.draw.integers(2**62)))
        return [Answer(honest.header, encode(changed, scene.packing, rounding))]

    return attack


def _on_header(**changes: Any) -> Attack:
    def attack(honest: Answer, scene: Scene) -> list[Answer]:
        return [Answer(json.dumps(json.loads(honest.header) | changes).encode(), honest.payload)]

    return attack


def _unpacked(honest: Answer, scene: Scene) -> Tensors:
    return decode(honest.payload, told_manifest(honest.payload, scene.packing), scene.packing)


def _first(update: Tensors) -> str:
    return min(update)


def _extra_key(update: Tensors, scene: Scene) -> Tensors:
    return update | {"extra": torch.zeros(1)}


def _missing_key(update: Tensors, scene: Scene) -> Tensors:
    return {name: value for name, value in update.items() if name != _first(update)}


def _renamed_key(update: Tensors, scene: Scene) -> Tensors:
    return {f"{name}_" if name == _first(update) else name: value for name, value in update.items()}


def _wrong_shape(update: Tensors, scene: Scene) -> Tensors:
    value = update[_first(update)]
    return update | {_first(update): value.flatten() if value.dim() > 1 else value.repeat(2)}


def _broadcastable_shape(update: Tensors, scene: Scene) -> Tensors:
    name = next(name for name in sorted(update) if update[name].shape[0] > 1)
    return update | {name: update[name][:1]}


def _wrong_dtype(honest: Answer, scene: Scene) -> list[Answer]:
    level = scene.packing.zstd
    content = decompress(honest.payload, LARGEST_DECLARATION, wire_error) if level else honest.payload
    other = {name: value.to(_OTHER_DTYPE.get(value.dtype, value.dtype)) for name, value in load(content).items()}
    manifest = told_manifest(honest.payload, scene.packing)
    changed = save(other, metadata=metadata_of(manifest, scene.packing))
    return [Answer(honest.header, compress(changed, level) if level else changed)]


def _one_entry(value: float) -> Attack:
    def change(update: Tensors, scene: Scene) -> Tensors:
        spoilt = update[_first(update)].clone()
        spoilt.view(-1)[0] = value
        return update | {_first(update): spoilt}

    return _on_update(change)


def _denormal_flood(update: Tensors, scene: Scene) -> Tensors:
    return {name: torch.full_like(value, _SUBNORMAL) for name, value in update.items()}


def _huge_norm(update: Tensors, scene: Scene) -> Tensors:
    norm = l2_norm(update)
    if norm == 0.0:
        return {name: torch.full_like(value, HUGE_NORM) for name, value in update.items()}
    return _scaled(update, HUGE_NORM / norm)


def _scaled(update: Tensors, factor: float) -> Tensors:
    return {name: (value.double() * factor).float() for name, value in update.items()}


def _gaussian_noise(update: Tensors, scene: Scene) -> Tensors:
    noise: dict[str, Tensor] = {
        name: torch.from_numpy(scene.draw.standard_normal(tuple(update[name].shape))) for name in sorted(update)
    }
    return _scaled(noise, l2_norm(update) / l2_norm(noise))


def _oversized(update: Tensors, scene: Scene) -> Tensors:
    return update | {"padding": torch.zeros(_PADDING + 4 * sum(value.numel() for value in update.values()))}


def _replay(honest: Answer, scene: Scene) -> list[Answer]:
    return [honest if scene.older is None else scene.older]


def _duplicate(honest: Answer, scene: Scene) -> list[Answer]:
    return [honest, honest]


ATTACKS: dict[AttackName, Attack] = {
    "extra_key": _on_update(_extra_key),
    "missing_key": _on_update(_missing_key),
    "renamed_key": _on_update(_renamed_key),
    "wrong_shape": _on_update(_wrong_shape),
    "broadcastable_shape": _on_update(_broadcastable_shape),
    "wrong_dtype": _wrong_dtype,
    "nan": _one_entry(float("nan")),
    "infinity": _one_entry(float("inf")),
    "denormal_flood": _on_update(_denormal_flood),
    "huge_norm": _on_update(_huge_norm),
    "sign_flip": _on_update(lambda update, scene: _scaled(update, -1.0)),
    "scale_1000": _on_update(lambda update, scene: _scaled(update, 1000.0)),
    "gaussian_noise": _on_update(_gaussian_noise),
    "replay": _replay,
    "duplicate": _duplicate,
    "wrong_base": _on_header(base_fingerprint="0" * 64),
    "oversized": _on_update(_oversized),
    "negative_weight": _on_header(num_examples=-1),
}
"""Attacks on the reply to a train request."""

DESCRIPTION_ATTACKS: dict[AttackName, Attack] = {
    "negative_weight": _on_header(num_examples=-1),
    "huge_weight": _on_header(num_examples=LARGEST_DECLARATION),
}
"""Attacks on a site's description, which is where a weight is declared. ``negative_weight`` is tried in both places."""
