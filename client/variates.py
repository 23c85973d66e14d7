"""A site's side of SCAFFOLD: its control variate, kept from round to round, and the correction of its steps.

See :mod:`common.variates` for the algorithm. The variate is a site state by round, as a personal adapter is
(:mod:`client.state`): memory does not grow with the number of virtual sites, and a resumed run sees what its rounds
left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client.personal import PersonalStore
from common.config.training import TrainingConfig
from common.errors import ConfigError, RunError
from common.tensors import Manifest, Tensors, add, manifest_of, subtract
from common.variates import change_of

_NAME = "variate"


@dataclass(frozen=True)
class Variates:
    """What corrects a site's steps in a round.

    Attributes:
        shared: c, as received.
        own: c_i, from the last round of the site that the coordinator took.
    """

    shared: Tensors
    own: Tensors

    def correction(self) -> Tensors:
        """Return c - c_i, which every step's gradient gets added."""
        return subtract(self.shared, self.own)

    def change(self, update: Mapping[str, Tensor], training: TrainingConfig, steps: int) -> Tensors:
        """Return Δc_i after a round of ``steps`` that gave ``update``."""
        return change_of(update, self.shared, training, steps)


def variates_before(store: PersonalStore | None, run: str, taken: int, manifest: Manifest) -> Tensors:
    """Return a site's c_i as round ``taken`` left it.

    Args:
        store: where the site keeps what is its own.
        run: the run's id.
        taken: the last round whose change of c_i the coordinator has; 0 for none, which gives zeros.
        manifest: the expected shapes by name.

    Raises:
        ConfigError: if the site has no place for it.
        RunError: if what it kept is gone or is something else.
    """
    if store is None:
        raise ConfigError(
            "training.control_variates keeps a variate at each site, and this virtual site has no place for it; "
            "expected fedtune-sim."
        )
    if taken == 0:
        return {name: torch.zeros(shape) for name, shape in manifest.items()}
    kept = store.states.before(run, store.site, _NAME, taken + 1)
    if kept is None or manifest_of(kept) != manifest:
        raise RunError(
            f"the control variate that round {taken} left is not here; expected what this site kept. Restore its state "
            "file, or leave the run."
        )
    return kept


def keep_variates(
    store: PersonalStore | None, run: str, number: int, taken: int, own: Tensors, change: Tensors
) -> None:
    """Keep c_i + Δc_i of round ``number``; what stood of rounds after ``taken`` is dropped, since nobody took it.

    Where none was taken, as when the federation starts its variates again, nothing is: a run resumed from before that
    asks for what stood.
    """
    if store is not None:
        store.states.write(run, store.site, number, {_NAME: add(own, change)}, after=taken or None)


def add_correction(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], correction: Mapping[str, Tensor]
) -> None:
    """Let every step of ``optimizer`` see c - c_i on top of the gradient.

    Args:
        optimizer: the one that takes the step.
        parameters: by name.
        correction: c - c_i, by the names of those it corrects.
    """
    held = [(parameters[name], value.to(parameters[name].device)) for name, value in correction.items()]

    def correct(running: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, value in held:
            if parameter.grad is not None:
                parameter.grad.add_(value)

    optimizer.register_step_pre_hook(correct)
