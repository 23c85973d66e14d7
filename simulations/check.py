"""What a run will do, worked out without training: sites, rows, steps, noise, ε, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.config.warnings import config_warnings
from common.data.tokens import FederatedTokens, load_federated_tokens
from common.errors import ConfigError, PrivacyError
from common.methods import method_of, received_names, sent_names, trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.privacy.advice import advise
from common.privacy.claim import privacy_claim
from common.privacy.planning import plain_steps, plan_mechanism, plan_site_level
from common.tensors import Tensors
from common.variates import marked
from server.cohort import expect_rule_holds
from simulations.cache import token_cache_folder
from simulations.faults.faults import Faults


def check_run(config: RunConfig, device: str = "auto") -> dict[str, Any]:
    """Load config, data and model, tokenise the rows, and plan the run.

    Raises:
        FedtuneError: for whatever would keep the run from starting.
    """
    model = resident_model(config, device)
    data = load_federated_tokens(config.data, config.seed, model.base.folder, token_cache_folder())
    expect_sound(config, data, model)
    faults = Faults.of(config, data.sites)
    start = initial_adapter(model, config.seed)
    names = trained_names(config, start) | trained_names(config, start, 2)
    up, down = _bytes(config, start)
    return {
        "name": config.name,
        "rounds": config.federation.rounds,
        "method": config.aggregation.method,
        "device": str(model.device),
        "base_fingerprint": model.base.fingerprint,
        "trained_parameters": sum(start[name].numel() for name in names),
        "base_parameters": sum(p.numel() for p in model.module.parameters()) - sum(t.numel() for t in start.values()),
        "bytes_per_site_and_round": {"up": up, "down": down},
        "correction_travels": method_of(config).corrects,
        "test_rows": sum(len(rows) for rows in data.test.values()),
        "test_rows_also_in_train": data.shared_with_test,
        "privacy_claim": privacy_claim(config, repeatable_noise=True),
        "site_level": _site_level(config, len(data.sites)),
        "warnings": [*config_warnings(config, len(data.sites))],
        "advice": _advice(config, data, sum(start[name].numel() for name in names)),
        "simulation": [] if faults is None else faults.describe(config.federation),
        "sites": {site: _plan(site, data, config) for site in data.sites},
    }


def expect_sound(config: RunConfig, data: FederatedTokens, model: AdaptedModel) -> None:
    """Check what every virtual site would otherwise refuse one by one.

    Raises:
        ConfigError: fewer sites than ``federation.min_sites``.
        RunError: fewer than the robust rule needs.
        PrivacyError: a budget that cannot be met, or a model family whose per-example gradients would be wrong.
    """
    if config.federation.min_sites > len(data.sites):
        raise ConfigError(
            f"federation.min_sites is {config.federation.min_sites} but the data has {len(data.sites)} sites; "
            "expected at most as many."
        )
    if config.privacy.is_local and not model.base.family.batch_first:
        raise PrivacyError(
            f"{model.base.folder.name} computes with time before batch, where per-example gradients would be wrong; "
            "expected another base model, or privacy.unit 'none'."
        )
    expect_rule_holds(config, len(data.sites))
    plan_site_level(config, len(data.sites))
    planned: set[int] = set()
    for site, units in _units(config, data).items():
        if units in planned:
            continue
        planned.add(units)
        try:
            plan_mechanism(config, units)
        except PrivacyError as error:
            raise PrivacyError(f"site {site!r}: {error}") from None


def _bytes(config: RunConfig, start: Tensors) -> tuple[int, int]:
    """Bytes of the largest payloads up and down of a round at the run's rank, before zstd and without a correction."""
    rounds = range(1, min(4, config.federation.rounds) + 1)

    def largest(named: Callable[[RunConfig, Iterable[str], int], frozenset[str]], packing: Packing) -> int:
        whole, draw = replace(packing, zstd=0), torch.Generator()
        return max(len(encode(tensors(named(config, start, number), number), whole, draw)) for number in rounds)

    def tensors(names: Iterable[str], number: int) -> Tensors:
        found = {name: start[name] for name in names}
        if config.training.control_variates:
            found |= marked({name: torch.zeros_like(start[name]) for name in sent_names(config, start, number)})
        return found

    up, down = Packing.of_update(config.communication), Packing.of_adapter(config.communication)
    return largest(sent_names, up), largest(received_names, down)


def _units(config: RunConfig, data: FederatedTokens) -> dict[str, int]:
    return {site: data.train[site].num_units(config.privacy.unit) for site in data.sites}


def _site_level(config: RunConfig, num_sites: int) -> dict[str, float] | None:
    mechanism = plan_site_level(config, num_sites)
    if mechanism is None:
        return None
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "epsilon_after_run": mechanism.epsilon_after(config.federation.rounds),
    }


def _advice(config: RunConfig, data: FederatedTokens, num_parameters: int) -> list[str]:
    """Advice for the smallest site, which the plan is hardest on."""
    units = _units(config, data)
    site = min(units, key=lambda name: units[name])
    mechanism = plan_mechanism(config, units[site])
    if mechanism is None:
        return []
    found = advise(config, mechanism, units[site], num_parameters, len(data.sites))
    return [f"{site}: {sentence}" for sentence in found]


def _plan(site: str, data: FederatedTokens, config: RunConfig) -> dict[str, Any]:
    rows, unit = len(data.train[site]), config.privacy.unit
    units = data.train[site].num_units(unit)
    mechanism = plan_mechanism(config, units)
    plan: dict[str, Any] = {"train_rows": rows, "test_rows": len(data.test.get(site, ()))}
    if unit == "user":
        plan["persons"] = units
    if mechanism is None:
        return plan | {"steps_per_round": plain_steps(config, rows)}
    return plan | {
        "steps_per_round": mechanism.steps_per_round,
        "sample_rate": mechanism.sample_rate,
        "noise_multiplier": mechanism.noise_multiplier,
        "epsilon_after_run": mechanism.epsilon_after(config.federation.rounds),
    }
