"""Training without a federation: one site's rows, or all rows in one place, with the very trainer of a federation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from client.site import Site
from client.training.loop import train_locally
from common.config.federation import FederationConfig
from common.config.run import RunConfig
from common.data.examples import Example
from common.data.federated import FederatedData
from common.errors import ConfigError
from common.factors import with_rank
from common.methods import expect_rank, trained_names
from common.models.adapter import AdaptedModel
from common.privacy.planning import Mechanism, plain_steps, plan_mechanism
from common.randomness import KeyedRandomness
from common.tasks.catalog import TASKS
from common.tensors import Tensors

POOLED = "all rows in one place"
"""Name of the one site that has all rows; it keys its randomness."""


def train_alone(model: AdaptedModel, site: Site, config: RunConfig, start: Mapping[str, Tensor]) -> Tensors:
    """Train ``config.federation.rounds`` rounds on one site's rows and return the adapter.

    The optimizer starts afresh every round, learning rate and privacy are planned over all rounds, adaptive clipping
    goes on where it stood, and factors have the rank that the site can hold. A federation of this site alone does the
    same, but for the wire's rounding, where the coordinator just adds the update. What belongs to a federation is left
    out: ``top_k``, server optimizers, robust rules, site-level noise, and the factors that flora, flexlora and fedsvd
    make anew between rounds; the site goes on with its own.

    Args:
        model: the resident model.
        site: rows and randomness.
        config: the run config.
        start: every adapter tensor by name, as initialised, at the run's rank.

    Raises:
        ConfigError: if the site cannot hold the run's rank and the method needs it.
    """
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    adapter, clip_norm = with_rank(start, expect_rank(config, site.max_rank, site.name)), None
    for number in range(1, config.federation.rounds + 1):
        names = trained_names(config, adapter, number)
        result = train_locally(model, site, config, adapter, names, number, mechanism, clip_norm)
        adapter |= {name: adapter[name] + change for name, change in result.update.items()}
        clip_norm = result.clip_norm
    return adapter


def alone_config(config: RunConfig) -> RunConfig:
    """Return what a site that trains alone does: the same, but for site-level privacy, which hides sites from others.

    Raises:
        ConfigError: if nothing valid comes of it.
    """
    if config.privacy.site_level_settings is None:
        return config
    unit = "none" if config.privacy.unit == "site" else config.privacy.unit
    return changed_config(config, privacy={"unit": unit, "site_level": None})


def pooled_config(config: RunConfig, data: FederatedData) -> RunConfig:
    """Return the run config of one place that has all rows and does the work of all sites.

    Its steps in a round are those of all sites that are asked together; its steps are as large as theirs on average, to
    the nearest row, so that a row is seen as often as on average there: the last step of a site's pass is smaller, and
    so is ``batch_size``, of a pool of many such sites. With local privacy the sample rate does the same, and the same
    ε and δ are planned anew for the pool: the noise of a step is then divided by the rows of the pool's own steps, and
    each row is in a smaller share of them.

    Raises:
        ConfigError: if nothing valid comes of it.
        PrivacyError: for a budget that a site cannot meet.
    """
    config = alone_config(config)
    plans = {site: _plan(config, rows) for site, rows in data.train.items()}
    asked = min(1.0, (config.federation.sites_per_round or len(plans)) / len(plans))
    steps = max(1, round(asked * sum(steps for steps, _ in plans.values())))
    training: dict[str, Any] = {"local_steps": steps, "local_epochs": None}
    given = config.federation
    rounds = FederationConfig(rounds=given.rounds, virtual_ranks=given.virtual_ranks).model_dump()
    if not config.privacy.is_local:
        rows_seen = asked * sum(_rows_seen(config, len(rows)) for rows in data.train.values())
        training["batch_size"] = max(1, round(rows_seen / steps))
        return changed_config(config, training=training, federation=rounds)
    seen = asked * sum(steps * m.expected_batch_size for steps, m in plans.values() if m is not None)
    units = sum(m.expected_batch_size / m.sample_rate for _, m in plans.values() if m is not None)
    return changed_config(
        config, training=training, federation=rounds,
        privacy={"sample_rate": min(1.0, seen / (steps * units))},
    )  # fmt: skip


def pooled_site(config: RunConfig, data: FederatedData, model: AdaptedModel) -> Site:
    """Return all training rows as one site. A person who is at two sites is two persons there, and here."""
    examples = [example for rows in data.train.values() for example in rows]
    rows = TASKS[config.data.task].tokenise(examples, model.base.tokenizer, config.data)
    keys = [(site, example.person) for site, own in data.train.items() for example in own]
    persons = None if any(person is None for _, person in keys) else _numbered(keys)
    return Site(POOLED, tuple(rows), tuple(map(len, rows)), KeyedRandomness(config.seed, POOLED), persons)


def _numbered(keys: Sequence[tuple[str, str | None]]) -> tuple[int, ...]:
    numbers: dict[tuple[str, str | None], int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _plan(config: RunConfig, rows: Sequence[Example]) -> tuple[int, Mechanism | None]:
    units = len({row.person for row in rows}) if config.privacy.unit == "user" else len(rows)
    mechanism = plan_mechanism(config, units)
    return (plain_steps(config, len(rows)) if mechanism is None else mechanism.steps_per_round), mechanism


def _rows_seen(config: RunConfig, num_examples: int) -> int:
    """Return the rows in a round's steps without local noise, each pass's last step smaller than the others."""
    size = config.training.batch_size
    passes, steps = divmod(plain_steps(config, num_examples), math.ceil(num_examples / size))
    return passes * num_examples + min(steps * size, num_examples)


def changed_config(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the config with some keys of sections changed, checked anew.

    Raises:
        ConfigError: if it is not valid so.
    """
    values = config.model_dump(mode="python")
    for section, keys in sections.items():
        values[section] |= keys
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"the baseline's config is not valid ({reason}); expected a config that allows it.") from None
