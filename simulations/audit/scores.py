"""Scores of an adversary: high for a row that seems to have been trained on.

The white-box adversary is the coordinator, the strongest that the guarantee speaks of: it chose nothing, but it sees
every adapter it sent to the site and every update that came back. The black-box one has the final adapter alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.codecs.codec import decode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.data.batches import Collator, Limit, TokenRow, micro_batches
from common.data.examples import Example
from common.methods import trained_names
from common.models.adapter import AdaptedModel
from common.tasks.catalog import TASKS
from common.tensors import Tensors, manifest_of

Scores = NDArray[np.float64]

KNOWN_ROWS = 500
"""Most rows of the site, besides the canaries, whose gradients the white-box adversary takes into account."""
RIDGES = tuple(10.0**power for power in range(-4, 7))
"""What λ is chosen from, in units of a gradient's mean squared length."""

_ROWS_AT_ONCE = 16


@dataclass
class Watched:
    """What the coordinator exchanged with one site, in the order of the rounds.

    Attributes:
        node: Flower's id of the site's node.
        exchanges: for every round the packed adapter that the site received and the packed update that it sent.
    """

    node: int
    exchanges: list[tuple[bytes, bytes]] = field(default_factory=list)

    def __call__(self, node: int, received: bytes, sent: bytes) -> None:
        """Keep what passed between the coordinator and ``node``, if it is the watched one and trained."""
        if node == self.node and received and sent:
            self.exchanges.append((received, sent))


def tokenised(model: AdaptedModel, config: RunConfig, examples: Sequence[Example]) -> list[TokenRow]:
    """Tokenise rows as the run does."""
    return TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)


def row_losses(model: AdaptedModel, config: RunConfig, adapter: Mapping[str, Tensor], rows: list[TokenRow]) -> Scores:
    """Return the loss of each row under ``adapter``, in nats, float64 [N]."""
    model.load(adapter)
    model.module.eval()
    losses = np.zeros(len(rows))
    with torch.inference_mode():
        for chosen in micro_batches([len(row) for row in rows], range(len(rows)), Limit(rows=_ROWS_AT_ONCE)):
            losses[chosen] = _losses(model, config, [rows[index] for index in chosen]).double().cpu().numpy()
    return losses


def white_box_scores(
    model: AdaptedModel,
    config: RunConfig,
    start: Tensors,
    watched: Watched,
    canaries: list[TokenRow],
    known: list[TokenRow],
) -> Scores:
    """Return, for each canary, how much of the site's updates it explains, summed over the rounds: [m].

    A round's update is, to first order, minus a sum of the clipped gradients G [n, P] of the rows that were sampled, at
    the adapter the site received, plus noise. So its inner product with minus a canary's gradient is larger where the
    canary was trained on (Steinke et al. 2305.08846, section 6). But gradients point alike, and what one row adds to
    the inner product of another drowns it. The coordinator of the guarantee may know every row but the one it guesses
    about; so all rows are weighed together, by the linear estimate of least squared error,

        b = (G Gᵀ + λ I)⁻¹ G (-update),

    which with large λ is the inner product up to a factor, and with small λ solves for who was there. λ is read off the
    update itself (see :func:`_weights`), not off the noise that is claimed: noise may be missing.

    Args:
        model: the resident model; its adapter values are overwritten.
        config: the run config.
        start: every tensor of the initial adapter.
        watched: what passed between coordinator and site.
        canaries: the tokenised canaries.
        known: other rows of the site; at most :data:`KNOWN_ROWS` of them are used.
    """
    names = trained_names(config, start)
    manifest = manifest_of({name: start[name] for name in names})
    rows = [*canaries, *known[:KNOWN_ROWS]]
    scores = np.zeros(len(canaries))
    down, up = Packing.of_adapter(config.communication), Packing.of_update(config.communication)
    for received, sent in watched.exchanges:
        model.load({**start, **decode(received, manifest, down)})
        gradients = torch.stack([_clipped_gradient(model, config, names, row) for row in rows])
        update = _flat(decode(sent, manifest, up))
        scores += _weights(gradients, -update)[: len(canaries)].numpy()
    return scores


def _weights(gradients: Tensor, change: Tensor) -> Tensor:
    """Explain ``change`` [P] by ``gradients`` [n, P] and return the weight of each, float64 [n].

    The model is change = Gᵀ b + e with b ~ N(0, s²), e ~ N(0, λ s²). λ is the one of :data:`RIDGES` under which the
    change is likeliest, s at its own best: it minimises P log(changeᵀ (GᵀG / λ + I)⁻¹ change) + log det(G Gᵀ / λ + I),
    both from the eigenvalues of G Gᵀ (the evidence of MacKay 1992, "Bayesian interpolation"). Coins play no part in it.
    """
    values, vectors = torch.linalg.eigh((gradients @ gradients.T).double())
    values = values.clamp(min=0.0)
    along = vectors.T @ (gradients @ change).double()
    whole = float(change.double().square().sum())
    best, ridge = math.inf, 1.0
    for candidate in (float(values.mean()) * factor for factor in RIDGES):
        if candidate == 0.0:
            continue
        rest = max(whole - float((along.square() / (values + candidate)).sum()), 1e-12 * whole, 1e-300)
        cost = len(change) * math.log(rest) + float(torch.log1p(values / candidate).sum())
        if cost < best:
            best, ridge = cost, candidate
    weights: Tensor = vectors @ (along / (values + ridge))
    return weights


def _clipped_gradient(model: AdaptedModel, config: RunConfig, names: frozenset[str], row: TokenRow) -> Tensor:
    """The gradient of one row by a backward pass of its own, clipped as in the run (or scaled to 1 without DP): [P]."""
    parameters = model.train_only(names)
    model.module.eval()
    _losses(model, config, [row]).sum().backward()  # type: ignore[no-untyped-call]
    gradient = _flat({name: p.grad for name, p in parameters.items() if p.grad is not None})
    model.train_only(frozenset())
    norm = float(gradient.norm())
    if norm == 0.0:
        return gradient
    return gradient * (min(1.0, config.privacy.clip_norm / norm) if config.privacy.is_local else 1.0 / norm)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries in order of name, float32 on the CPU: [P]."""
    return torch.cat([tensors[name].detach().cpu().float().flatten() for name in sorted(tensors)])


def _losses(model: AdaptedModel, config: RunConfig, rows: list[TokenRow]) -> Tensor:
    batch = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)(rows).to(model.device)
    return TASKS[config.data.task].loss_per_sequence(model.logits(batch.input_ids, batch.attention_mask), batch)
