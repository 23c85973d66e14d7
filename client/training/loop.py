"""Local training: a round's steps on one site's rows, with or without differential privacy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from client.dp.clipping import MovingClip, ReleasedLoss
from client.dp.sampling import poisson_batches, shuffled_batches
from client.dp.step import DpStep
from client.site import Site
from client.training.features import row_features, site_states
from client.training.optimizers import lr_factor, make_optimizer, set_lr
from client.training.proximal import add_proximal_term
from common.config.run import RunConfig
from common.data.batches import Collator, micro_batch_limit, micro_batches
from common.errors import RunError
from common.models.adapter import AdaptedModel
from common.privacy.planning import Mechanism, plain_steps
from common.randomness import stream_seed, torch_generator
from common.tasks.catalog import TASKS
from common.tensors import Tensors, subtract


@dataclass(frozen=True)
class LocalResult:
    """What a round of local training gave.

    Attributes:
        update: local minus received adapter, for the trained names; float32 on the CPU.
        steps: steps taken.
        train_loss: mean loss over the rows seen, in nats; under differential privacy None, or noisy and charged.
        clip_norm: where adaptive clipping ended; None without it.
    """

    update: Tensors
    steps: int
    train_loss: float | None
    clip_norm: float | None = None


class GradientStep(Protocol):
    """How the losses of a step's micro-batches become a step of the optimizer."""

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Take the losses [b] of a micro-batch out of a step of ``rows`` rows."""

    def apply(self, rows: int) -> None:
        """Finish a step of ``rows`` rows."""


@dataclass(frozen=True)
class PlainStep:
    """The mean gradient over the rows of a step, its norm clipped where the config says so."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None

    def micro_batch(self, losses: Tensor, rows: int, persons: Sequence[int] | None = None) -> None:
        """Add the gradient of the losses' share of the mean."""
        (losses.sum() / rows).backward()  # type: ignore[no-untyped-call]

    def apply(self, rows: int) -> None:
        """Step on the accumulated gradient."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_locally(
    model: AdaptedModel,
    site: Site,
    config: RunConfig,
    adapter: Mapping[str, Tensor],
    names: frozenset[str],
    round_number: int,
    mechanism: Mechanism | None,
    clip_norm: float | None = None,
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
    """
    model.load(adapter)
    parameters = model.train_only(names)
    optimizer = make_optimizer(config.training, parameters)
    add_proximal_term(optimizer, config.training.proximal_mu)
    steps = _steps(site, config, mechanism)
    clip, released = _side_answers(config, mechanism, clip_norm)
    loss_sum, rows_seen = 0.0, 0
    step = _gradient_step(model, parameters, optimizer, site, config, round_number, mechanism, clip, released)
    with _seeded(model.device, _dropout_seed(site, config, round_number, mechanism)), step as running:
        model.module.train()
        for done, batch in enumerate(local_batches(site, config, round_number, steps, mechanism)):
            progress = (round_number - 1 + (done + 0.5) / steps) / config.federation.rounds
            set_lr(optimizer, lr_factor(config.training, progress))
            loss_sum += _run_batch(model, site, config, batch, running)
            rows_seen += len(batch)
    trained = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    update = subtract(trained, adapter)
    if clip is not None and released is not None:
        return LocalResult(update, steps, released.value(), clip.value if clip.adaptive else None)
    mean = loss_sum / max(1, rows_seen)
    if not math.isfinite(mean):
        raise RunError(f"training diverged: the loss of a round is {mean}; expected a number. Lower training.lr.")
    return LocalResult(update, steps, mean)


def _side_answers(
    config: RunConfig, mechanism: Mechanism | None, clip_norm: float | None
) -> tuple[MovingClip | None, ReleasedLoss | None]:
    if mechanism is None:
        return None, None
    privacy = config.privacy
    clip = MovingClip(mechanism, privacy.clip_quantile, privacy.clip_lr, clip_norm)
    return clip, ReleasedLoss(mechanism, privacy.loss_bound)


def _steps(site: Site, config: RunConfig, mechanism: Mechanism | None) -> int:
    if mechanism is not None:
        return mechanism.steps_per_round
    return plain_steps(config, len(site.rows))


def local_batches(
    site: Site, config: RunConfig, round_number: int, steps: int, mechanism: Mechanism | None
) -> Iterator[list[int]]:
    """Yield the rows of each of a round's steps, as the site draws them.

    Args:
        site: rows and randomness.
        config: the run config.
        round_number: from 1.
        steps: batches to yield.
        mechanism: the planned mechanism, None without DP.
    """
    if mechanism is not None:
        stream = site.randomness.stream("sampling", round_number)
        batches = poisson_batches(site.num_units(mechanism.unit), mechanism.sample_rate, steps, stream)
        return batches if mechanism.unit != "user" else map(site.rows_of_persons, batches)
    order = torch_generator(config.seed, "order", round_number, site.name)
    return shuffled_batches(len(site.rows), config.training.batch_size, steps, order)


def _gradient_step(
    model: AdaptedModel,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    site: Site,
    config: RunConfig,
    round_number: int,
    mechanism: Mechanism | None,
    clip: MovingClip | None,
    released: ReleasedLoss | None,
) -> AbstractContextManager[GradientStep]:
    if mechanism is None:
        return nullcontext(PlainStep(list(parameters.values()), optimizer, config.training.max_grad_norm))
    noise = site.randomness.stream("noise", round_number)
    batch_first = model.base.family.batch_first
    return DpStep(model.module, parameters, optimizer, mechanism, noise, batch_first, clip=clip, loss=released)


def _run_batch(model: AdaptedModel, site: Site, config: RunConfig, batch: list[int], step: GradientStep) -> float:
    """Compute one step in micro-batches and return the summed loss of its rows."""
    task = TASKS[config.data.task]
    collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
    limit = micro_batch_limit(config.training.micro_batch_size, model.device, packed=model.packs)
    total = 0.0
    features = row_features(model, site, config)
    states = site_states(model, site, config) if features is None else None
    persons = site.persons if config.privacy.unit == "user" else None
    for indices in micro_batches(site.lengths, batch, limit, persons):
        rows = collate([site.rows[index] for index in indices]).to(model.device)
        if features is not None:
            logits = features.logits(indices)
        else:
            start = None if states is None else states.start(indices)
            logits = model.logits(rows.input_ids, rows.attention_mask, start)
        losses = task.loss_per_sequence(logits, rows)
        step.micro_batch(losses, len(batch), None if persons is None else [persons[index] for index in indices])
        total += float(losses.detach().sum())
    step.apply(len(batch))
    return total


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
