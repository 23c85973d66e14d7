"""Local training: a round's steps on one site's rows, with or without differential privacy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from client.site import Site
from client.training.features import row_features, site_states
from client.training.site_round import LocalResult, SiteRound
from client.training.steps import GradientStep
from common.config.run import RunConfig
from common.data.batches import Collator, micro_batch_limit, micro_batches
from common.models.adapter import AdaptedModel
from common.privacy.planning import Mechanism
from common.randomness import stream_seed
from common.tasks.catalog import TASKS


def train_locally(
    model: AdaptedModel,
    site: Site,
    config: RunConfig,
    adapter: Mapping[str, Tensor],
    names: frozenset[str],
    round_number: int,
    mechanism: Mechanism | None,
    clip_norm: float | None = None,
    correction: Mapping[str, Tensor] | None = None,
) -> LocalResult:
    """Train from ``adapter`` on the site's rows and return the update.

    Without DP the result is a function of (config, adapter, round, site) alone. With DP its noise and sampling come
    from the site's own randomness.

    Args:
        model: the resident model; left with the trained values.
        site: rows and randomness.
        config: the run config.
        adapter: every adapter tensor by name.
        names: those that are trained; the others stay as they are.
        round_number: from 1.
        mechanism: the planned mechanism, None without DP.
        clip_norm: where adaptive clipping starts; the mechanism's own if not given.
        correction: what control variates add to every step's gradient, by name; None without them.
    """
    model.load(adapter)
    own = SiteRound(
        model, model.train_only(names), site, config, round_number, mechanism, clip_norm, correction=correction
    )
    with _seeded(model.device, _dropout_seed(site, config, round_number, mechanism)), own as step:
        model.module.train()
        for batch in own.batches():
            _run_batch(model, own, config, batch, step)
    return own.result(adapter)


def _run_batch(model: AdaptedModel, own: SiteRound, config: RunConfig, batch: list[int], step: GradientStep) -> None:
    """Compute one step in micro-batches."""
    site, task = own.site, TASKS[config.data.task]
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    limit = micro_batch_limit(config.training.micro_batch_size, model.device, packed=model.packs)
    features = row_features(model, site, config)
    states = site_states(model, site, config) if features is None else None
    for indices in micro_batches(site.lengths, batch, limit, own.persons):
        rows = collate([site.rows[index] for index in indices]).to(model.device)
        if features is not None:
            logits = features.logits(indices)
        else:
            start = None if states is None else states.start(indices)
            logits = model.logits(rows.input_ids, rows.attention_mask, start)
        losses = task.loss_per_sequence(logits, rows)
        step.micro_batch(losses, len(batch), own.persons_of(indices))
        own.observe(losses)
    step.apply(len(batch))


def _dropout_seed(site: Site, config: RunConfig, round_number: int, mechanism: Mechanism | None) -> int:
    """Seed of the dropout masks. Under DP they come from the site's own randomness.

    Masks fall to records by position, so that one more record shifts the others' masks: with masks that the coordinator
    knows, that would move the sum by more than the clip norm.
    """
    if mechanism is None:
        return stream_seed(config.seed, "dropout", round_number, site.name)
    return int(float(site.randomness.stream("dropout", round_number).uniform(1)) * 2**53)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators (dropout in the adapter draws from them) and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed & (2**63 - 1))
        yield
