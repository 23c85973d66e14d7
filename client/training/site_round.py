"""A site's round of local training: its optimizer, clip norm, batches and loss, advanced step by step.

What computes losses and gradients drives it: :func:`client.training.loop.train_locally` for one site, and in a
simulation one pass for several virtual sites. So that both do the same, everything that belongs to a site is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from client.dp.capture import Capture
from client.dp.clipping import MovingClip, ReleasedLoss
from client.dp.sampling import poisson_batches, shuffled_batches
from client.site import Site
from client.training.optimizers import lr_factor, make_optimizer, set_lr
from client.training.proximal import add_proximal_term
from client.training.steps import JointStep, PlainStep
from client.variates import add_correction
from common.config.run import RunConfig
from common.errors import RunError
from common.models.adapter import AdaptedModel
from common.privacy.planning import Mechanism, plain_steps
from common.randomness import torch_generator
from common.tensors import Tensors, subtract
from common.wire import LARGEST_LOSS


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


class SiteRound:
    """One round at one site. A context manager: steps are taken between enter and exit.

    Args:
        model: the resident model.
        parameters: what is trained, by name, holding the received values: the model's own, or a site's.
        site: rows and randomness.
        config: the run config.
        round_number: from 1.
        mechanism: the planned mechanism, None without DP.
        clip_norm: where adaptive clipping starts; the mechanism's own if not given.
        capture: see :class:`client.dp.step.DpStep`.
        correction: what control variates add to every step's gradient, by name; None without them.

    Attributes:
        persons: the person of each of the site's rows, under unit "user"; else None.
    """

    def __init__(
        self,
        model: AdaptedModel,
        parameters: Mapping[str, nn.Parameter],
        site: Site,
        config: RunConfig,
        round_number: int,
        mechanism: Mechanism | None,
        clip_norm: float | None = None,
        *,
        capture: Capture = "layers",
        correction: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.site = site
        self.persons = site.persons if config.privacy.unit == "user" else None
        self._parameters, self._config, self._round = parameters, config, round_number
        self._optimizer = make_optimizer(config.training, parameters)
        add_proximal_term(self._optimizer, config.training.proximal_mu)
        if correction is not None:
            add_correction(self._optimizer, parameters, correction)
        self._steps = _steps(site, config, mechanism)
        self._clip, self._released = _side_answers(config, mechanism, clip_norm)
        self._opened: AbstractContextManager[JointStep]
        if mechanism is None:
            norm = config.training.max_grad_norm
            self._opened = nullcontext(PlainStep(list(parameters.values()), self._optimizer, norm))
        else:
            from client.dp.step import DpStep  # brings Opacus, which sites without DP need not load

            self._opened = DpStep(
                model.module, parameters, self._optimizer, mechanism, site.randomness.stream("noise", round_number),
                model.base.family.batch_first, capture, clip=self._clip, loss=self._released,
            )  # fmt: skip
        self._batches = local_batches(site, config, round_number, self._steps, mechanism)
        self._loss_sum, self._rows_seen = 0.0, 0

    def __enter__(self) -> JointStep:
        return self._opened.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def batches(self) -> Iterator[list[int]]:
        """Yield the rows of each step, which may be none under DP, and set its learning rate."""
        for done, batch in enumerate(self._batches):
            progress = (self._round - 1 + (done + 0.5) / self._steps) / self._config.federation.rounds
            set_lr(self._optimizer, lr_factor(self._config.training, progress))
            yield batch

    def persons_of(self, rows: list[int]) -> list[int] | None:
        """Return the persons of some rows, under unit "user"; else None."""
        return None if self.persons is None else [self.persons[row] for row in rows]

    def observe(self, losses: Tensor) -> None:
        """Take note of the losses [b] of a micro-batch."""
        self._loss_sum += float(losses.detach().sum())
        self._rows_seen += len(losses)

    def result(self, received: Mapping[str, Tensor]) -> LocalResult:
        """Return what the round gave.

        Args:
            received: the adapter it started from.

        Raises:
            RunError: if the loss is no number, or beyond any training; under DP that would tell of rows, and it is
                withheld or noisy.
        """
        trained = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        update = subtract(trained, received)
        if self._clip is not None and self._released is not None:
            moved = self._clip.value if self._clip.adaptive else None
            return LocalResult(update, self._steps, self._released.value(), moved)
        mean = self._loss_sum / max(1, self._rows_seen)
        if not math.isfinite(mean) or abs(mean) > LARGEST_LOSS:
            raise RunError(
                f"training diverged: the loss of a round is {mean:.3g}; expected a number below {LARGEST_LOSS:g}. "
                "Lower training.lr."
            )
        return LocalResult(update, self._steps, mean)


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
