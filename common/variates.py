"""SCAFFOLD's control variates (Karimireddy et al. 1910.06378, Algorithm 1, option II).

A site's plain SGD drifts towards its own optimum. SCAFFOLD keeps at each site the mean gradient c_i of its last round
and at the coordinator their mean c, and lets every step take the gradient corrected by the difference. With x what a
site received, y where its K steps of rate η end, p_i its weight among all N sites and S those that answered:

* site: y ← y - η (g(y) - c_i + c), then c_i⁺ = c_i - c + (x - y) / (K η);
* wire: Δy = y - x and Δc_i = c_i⁺ - c_i = -c - Δy / (K η) up; x and c down;
* coordinator: x ← x + Σ p_i Δy_i, as without, and c ← c + Σ_S p_i Δc_i.

Δc_i follows from c, Δy_i and K, and K from the rows that a site declared, so that the coordinator can check every
number of it. A site that declares other rows than it has, once for the whole run, can still scale its own c_i.
A change that did not reach the coordinator is not a site's to keep: each request names the last one that was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from common.config.training import TrainingConfig
from common.methods import is_head
from common.tensors import Manifest, Tensors

PREFIX = "variate/"
"""What the names of control variates begin with on the wire."""


def marked(variates: Mapping[str, Tensor]) -> Tensors:
    """Return variates under their names on the wire."""
    return {PREFIX + name: value for name, value in variates.items()}


def with_variates(manifest: Manifest) -> Manifest:
    """Return the manifest of a payload that has a variate for each tensor."""
    return manifest | {PREFIX + name: shape for name, shape in manifest.items()}


def parted(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Return what else a payload holds, and its variates by the names of what they are of."""
    variates = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    return {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}, variates


def change_of(
    update: Mapping[str, Tensor], shared: Mapping[str, Tensor], training: TrainingConfig, steps: int
) -> Tensors:
    """Return Δc_i = -c - Δy / (K η), float32, by the names of ``shared``.

    Args:
        update: Δy; may hold more.
        shared: c.
        training: η of each tensor; constant over the round.
        steps: K, at least 1.
    """
    rates = _rates(training, shared)
    return {
        name: (-value.double() - update[name].double() / (rates[name] * steps)).float()
        for name, value in shared.items()
    }


def _rates(training: TrainingConfig, names: Iterable[str]) -> dict[str, float]:
    head = training.lr if training.head_lr is None else training.head_lr
    return {name: head if is_head(name) else training.lr for name in names}
