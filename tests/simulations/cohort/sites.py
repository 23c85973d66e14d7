"""Assignments of any size for virtual sites, and how far apart two ways of training them end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from client.answers import Assignment
from client.site import Site, virtual_site
from client.training.loop import train_locally
from client.training.site_round import LocalResult
from common.config.run import RunConfig
from common.methods import trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.privacy.planning import plan_mechanism
from common.randomness import KeyedRandomness, torch_generator
from common.tensors import l2_norm, subtract
from common.wire import TrainRequest


def assignments(
    config: RunConfig, model: AdaptedModel, sizes: Sequence[int], round_number: int = 1
) -> list[Assignment]:
    """One site a size, with rows of the data; the adapter received is a little off the initial one."""
    rows = [
        row
        for node in range(3)
        for row in virtual_site(config, {"partition-id": node, "num-partitions": 3}, model).rows
    ]
    start = initial_adapter(model, config.seed)
    names = trained_names(config, start)
    moved = {
        name: value + 0.1 * torch.randn(value.shape, generator=torch_generator(1, name)) if name in names else value
        for name, value in start.items()
    }
    found = []
    for number, size in enumerate(sizes):
        own = tuple(rows[number : number + size])
        persons = tuple(index * 2 // 3 for index in range(size))
        randomness = KeyedRandomness(config.seed, f"site {number}")
        site = Site(f"site {number}", own, tuple(map(len, own)), randomness, persons)
        request = TrainRequest(
            config_digest=config.digest(), run="0" * 32, round=round_number, nonce=f"{number:032x}",
            base_fingerprint=model.base.fingerprint,
        )  # fmt: skip
        mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
        found.append(Assignment(request, site, moved, names, mechanism))
    return found


def one_by_one(model: AdaptedModel, config: RunConfig, assigned: Sequence[Assignment]) -> list[LocalResult]:
    """What each site gives alone."""
    return [
        train_locally(
            model, each.site, config, each.adapter, each.names, each.request.round, each.mechanism,
            each.request.clip_norm,
        )
        for each in assigned
    ]  # fmt: skip


def distance(found: LocalResult | Exception, expected: LocalResult) -> float:
    """Of two updates, as a share of the norm."""
    assert isinstance(found, LocalResult), found
    return l2_norm(subtract(found.update, expected.update)) / l2_norm(expected.update)
