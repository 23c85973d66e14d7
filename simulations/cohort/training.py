"""Local training of several virtual sites at once: their steps' rows go through the model together.

Each site keeps its own parameters, optimizer, learning rate, batches, clip norm and noise, all as
:class:`client.training.site_round.SiteRound` has them; what is shared is the forward and backward pass, in which no sum
runs over two sites. So each gets the update that it would get alone, to the rounding of the products: matrix products
of other sizes round otherwise.

::

    step of every site ─→ rows, site after site ─→ passes of at most so many tokens ─→ losses [b]
                                                                    │ one backward pass of Σ share · loss
    one optimizer step a site ←─ clipped, noised ←─ gradients, or per-example ones, on each site's own parameters

A site whose steps are done drops out; one that fails does so alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client.answers import Assignment
from client.training.features import may_have_features, site_states
from client.training.site_round import LocalResult, SiteRound
from client.training.steps import JointStep
from common.config.run import RunConfig
from common.data.batches import Collator, Limit, TokenRow, micro_batch_limit, micro_batches
from common.methods import method_of
from common.models.adapter import AdaptedModel
from common.models.frozen import FrozenStates
from common.models.packing import Start
from common.tasks.catalog import TASKS
from common.tensors import Tensors
from simulations.cohort.layers import Share, divided_layers, divisible_layers

GRADIENT_BYTES = {"cpu": 2**26, "cuda": 2**31}
"""Most bytes of per-example gradients in a pass, by type of device; always enough for one row."""

SITE_BYTES_PER_WEIGHT = 24
"""Of a site in training: weight, gradient and two moments in float32, and under DP a sum in float64."""

SITES_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Most bytes that the sites of a joint pass hold, by type of device; always enough for one site."""


def can_train_together(model: AdaptedModel, config: RunConfig, names: frozenset[str]) -> bool:
    """Whether a run's sites can go through the model together.

    They go one by one where the model computes on padded rows (XLNet, a prompt, gradient checkpointing), where
    something else than linear layers is trained, with dropout, whose masks are seeded by site, at ranks of their own,
    and for a head on features that are computed once, which costs no pass at all.
    """
    return (
        model.packs
        and config.adapter.dropout == 0
        and not config.federation.virtual_ranks
        and not method_of(config).core
        and not may_have_features(model, config)
        and divisible_layers(model, names) is not None
    )


def most_sites(model: AdaptedModel, names: frozenset[str]) -> int:
    """Return how many sites' parameters, gradients, sums and optimizer states may be held at once."""
    trained = sum(parameter.numel() for name, parameter in model.parameters.items() if name in names)
    allowed = SITES_BYTES.get(model.device.type, SITES_BYTES["cpu"])
    return max(1, allowed // max(1, SITE_BYTES_PER_WEIGHT * trained))


def joint_limit(config: RunConfig, model: AdaptedModel, names: frozenset[str]) -> Limit:
    """Return what a pass may hold: as many tokens as for one site, and rows as their per-example gradients allow.

    ``training.micro_batch_size`` in rows limits the rows of a pass, whosever they are.
    """
    limit = micro_batch_limit(config.training.micro_batch_size, model.device, packed=True)
    if config.training.micro_batch_size != "auto":
        return limit
    if not config.privacy.is_local:
        return Limit(tokens=limit.tokens)
    row_bytes = 4 * sum(parameter.numel() for name, parameter in model.parameters.items() if name in names)
    allowed = GRADIENT_BYTES.get(model.device.type, GRADIENT_BYTES["cpu"])
    return Limit(rows=max(1, allowed // max(1, row_bytes)), tokens=limit.tokens)


def train_together(
    model: AdaptedModel, config: RunConfig, assigned: Sequence[Assignment]
) -> list[LocalResult | Exception]:
    """Train a round of several sites and return what each gave, or why it failed.

    Args:
        model: the resident model; its trained parameters are not touched.
        config: the run config; :func:`can_train_together`.
        assigned: what is asked of each site; all under the one run config.

    Raises:
        Exception: whatever the joint pass itself fails on; then no site has trained.
    """
    names = assigned[0].names
    layers = divisible_layers(model, names) or {}
    model.corrections.set(assigned[0].adapter, model.device)
    model.load({name: value for name, value in assigned[0].adapter.items() if name not in names})
    model.train_only(frozenset())
    sites = [_own_parameters(each, model.device) for each in assigned]
    states = [site_states(model, each.site, config) for each in assigned]
    private = assigned[0].mechanism is not None
    with ExitStack() as opened, divided_layers(model, layers, sites, private=private) as running:
        model.module.train()
        training = _JointSteps(model, config, joint_limit(config, model, names), running.hold, states)
        for each, parameters in zip(assigned, sites, strict=True):
            training.add(each, parameters, opened)
        while training.step():
            pass
    return [training.outcome(number, each.adapter) for number, each in enumerate(assigned)]


def _own_parameters(assigned: Assignment, device: torch.device) -> dict[str, nn.Parameter]:
    """Leaf tensors with the received values of what is trained, in order of name."""
    return {name: nn.Parameter(assigned.adapter[name].to(device, copy=True)) for name in sorted(assigned.names)}


@dataclass
class _Running:
    """A site that still has steps to take, and the rows of the one it takes now."""

    round: SiteRound
    step: JointStep
    batches: Iterator[list[int]]
    batch: list[int]


class _JointSteps:
    """Takes the steps of all sites, one of each at a time."""

    def __init__(
        self, model: AdaptedModel, config: RunConfig, limit: Limit, hold: Callable[[Sequence[Share]], None],
        states: Sequence[FrozenStates | None],
    ) -> None:  # fmt: skip
        self._model, self._limit, self._hold, self._states = model, limit, hold, states
        self._task = TASKS[config.data.task]
        self._config = config
        self._collate = Collator(model.base.tokenizer.pad_token_id, model.base.family.padding_side)
        self._rounds: list[SiteRound | None] = []
        self._active: dict[int, _Running] = {}
        self._failures: dict[int, Exception] = {}

    def add(self, assigned: Assignment, parameters: Mapping[str, nn.Parameter], opened: ExitStack) -> None:
        """Take a site in."""
        number = len(self._rounds)
        self._rounds.append(None)
        self._alone(number, self._open, number, assigned, parameters, opened)

    def step(self) -> bool:
        """Take a step at every site that has one left; return whether there was any."""
        for number in list(self._active):
            self._alone(number, self._begin, number)
        for piece in self._pieces():
            still = [(number, rows) for number, rows in piece if number in self._active]
            if still:
                self._compute(still)
        for number in list(self._active):
            self._alone(number, self._apply, number)
        return bool(self._active)

    def outcome(self, number: int, received: Tensors) -> LocalResult | Exception:
        """Return what a site's round gave, or why it failed."""
        own = self._rounds[number]
        if number in self._failures or own is None:
            return self._failures[number]
        try:
            return own.result(received)
        except Exception as error:  # noqa: BLE001 - of this site alone
            return error

    def _alone(self, number: int, work: Callable[..., None], *arguments: Any) -> None:
        """Do a site's own work; what goes wrong in it ends this site's round and no other's."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 - handed to whoever answers for the site
            self._failures[number] = error
            self._active.pop(number, None)

    def _open(
        self, number: int, assigned: Assignment, parameters: Mapping[str, nn.Parameter], opened: ExitStack
    ) -> None:
        own = SiteRound(
            self._model, parameters, assigned.site, self._config, assigned.request.round, assigned.mechanism,
            assigned.request.clip_norm, capture="outside", correction=assigned.correction(),
        )  # fmt: skip
        self._rounds[number] = own
        self._active[number] = _Running(own, opened.enter_context(own), own.batches(), [])

    def _begin(self, number: int) -> None:
        batch = next(self._active[number].batches, None)
        if batch is None:
            del self._active[number]
        else:
            self._active[number].batch = batch

    def _apply(self, number: int) -> None:
        running = self._active[number]
        running.step.apply(len(running.batch))

    def _pieces(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Yield the rows of each pass, as sites and the rows of each; longest first within a site."""
        ordered: list[tuple[int, int]] = []
        for number, running in self._active.items():
            own = running.round
            for rows in micro_batches(own.site.lengths, running.batch, Limit(), own.persons):
                ordered += [(number, row) for row in rows]
        lengths = [self._active[number].round.site.lengths[row] for number, row in ordered]
        start = 0
        for count in self._limit.cut(lengths):
            piece: dict[int, list[int]] = {}
            for number, row in ordered[start : start + count]:
                piece.setdefault(number, []).append(row)
            yield list(piece.items())
            start += count

    def _compute(self, piece: list[tuple[int, list[int]]]) -> None:
        """Run one pass, forward and backward, and hand each site what it left."""
        rows: list[TokenRow] = []
        shares: list[float] = []
        for number, own in piece:
            running = self._active[number]
            rows += [running.round.site.rows[row] for row in own]
            shares += [running.step.share(len(running.batch))] * len(own)
        self._hold([Share(number, len(own)) for number, own in piece])
        batch = self._collate(rows).to(self._model.device)
        logits = self._model.logits(batch.input_ids, batch.attention_mask, self._start(piece))
        losses: Tensor = self._task.loss_per_sequence(logits, batch)
        (losses * losses.new_tensor(shares)).sum().backward()  # type: ignore[no-untyped-call]
        parts = torch.split(losses.detach(), [len(own) for _, own in piece])
        for (number, own), found in zip(piece, parts, strict=True):
            self._alone(number, self._collect, number, own, found)

    def _start(self, piece: list[tuple[int, list[int]]]) -> Start | None:
        """Return where the pass starts: where training begins to change states, if all its sites have them."""
        starts = [(self._states[number], own) for number, own in piece]
        parts = [states.start(own) for states, own in starts if states is not None]
        if len(parts) < len(starts):
            return None
        return Start(parts[0].depth, torch.cat([part.states for part in parts], dim=1))

    def _collect(self, number: int, rows: list[int], losses: Tensor) -> None:
        running = self._active[number]
        running.step.collect(losses, running.round.persons_of(rows))
        running.round.observe(losses)
