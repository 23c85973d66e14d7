"""The policy against a run: the key of the run config that goes beyond it is named, in the site's log and to the run.

Four moments, each before anything is charged or trained:

=====================  ==============================================================================================
:func:`expect_open`    the message arrives: the site is not paused, and the hour is one of its own
:func:`expect_run`     the run config is known: what it says alone; no row is read before
:func:`expect_size`    the adapter's numbers are counted on the base model's shapes; nothing is loaded or made before
:func:`expect_plan`    rows are counted and noise is planned: noise, steps, ε of the whole run
=====================  ==============================================================================================

The key's name leaves the site with the refusal: it is the coordinator's own. Limits and figures stay in the site's log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from client.ledger.events import Charge
from client.ledger.spending import charge_of, epsilon_of
from client.policy.section import Policy
from client.site_config import Budget
from common.config.run import RunConfig
from common.errors import PolicyError
from common.models.adapter import AdaptedModel
from common.models.size import adapter_size
from common.privacy.planning import Mechanism

_SHOWN = 80


def expect_open(policy: Policy, now: datetime) -> None:
    """Check that the site answers at all.

    Args:
        policy: the site's.
        now: the time on the site's clock.

    Raises:
        PolicyError: with code "paused", if it does not.
    """
    if policy.pause:
        raise PolicyError("policy.pause", "the site is paused; expected policy.pause: false.", code="paused")
    first, last = policy.span
    at = now.time()
    inside = first <= at <= last if first <= last else at >= first or at <= last
    if not inside:
        raise PolicyError("policy.hours", f"it is {at:%H:%M}; expected policy.hours {policy.hours}.", code="paused")


def expect_run(policy: Policy, config: RunConfig) -> None:
    """Check a run config against the policy, key by key; see :data:`RULES`.

    Raises:
        PolicyError: naming the first key that goes beyond it.
    """
    for key, rule in RULES.items():
        expected = rule(policy, config)
        if expected is not None:
            raise _beyond(key, _value(config, key), expected)


def expect_plan(policy: Policy, config: RunConfig, mechanism: Mechanism, budget: Budget) -> None:
    """Check what a run would do at this site.

    Args:
        policy: the site's.
        config: the run config.
        mechanism: as planned for the site.
        budget: the site's, whose δ and unit ε per run is counted in.

    Raises:
        PolicyError: naming the key of the run config that goes beyond it.
        PrivacyError: if the budget cannot count the run's unit.
    """
    privacy, steps = config.privacy, mechanism.steps_per_round
    target = "privacy.epsilon" if privacy.target_epsilon is not None else "privacy.noise_multiplier"
    if steps > policy.largest_steps_per_round:
        key = "training.local_steps" if config.training.local_steps is not None else "training.local_epochs"
        got = f"{steps} steps a round (training.batch_size, privacy.sample_rate)"
        raise _beyond(key, got, f"at most {policy.largest_steps_per_round}, which is policy.largest_steps_per_round")
    least = policy.least_noise_multiplier
    if least is not None and mechanism.noise_multiplier < least:
        got = f"a noise multiplier of {mechanism.noise_multiplier:.4g} (planned from {_planned_from(config)})"
        raise _beyond(target, got, f"at least {least:g}, which is policy.least_noise_multiplier")
    if policy.epsilon_per_run is not None:
        whole = _epsilon((charge_of(mechanism, config.federation.rounds),), budget)
        if whole > policy.epsilon_per_run:
            got = f"ε {whole:.3f} over the run (from {_planned_from(config)})"
            raise _beyond(target, got, f"at most {policy.epsilon_per_run:g}, which is policy.epsilon_per_run")


def expect_run_spend(policy: Policy, charges: Sequence[Charge], budget: Budget) -> None:
    """Check what a run has spent by the ledger, the round that is asked for included.

    A plan alone does not bound it: one run's id could come with several run configs.

    Args:
        policy: the site's.
        charges: of all rounds of the run, under whatever config they were asked for.
        budget: the site's.

    Raises:
        PolicyError: if it is beyond ``policy.epsilon_per_run``.
    """
    if policy.epsilon_per_run is None:
        return
    spent = _epsilon(tuple(charges), budget)
    # Split in rounds or whole, the accountant's numbers may differ in the last digits.
    if spent > policy.epsilon_per_run * (1 + 1e-6):
        got = f"ε {spent:.3f} with this round"
        raise _beyond("federation.rounds", got, f"at most {policy.epsilon_per_run:g} for one run")


def expect_size(policy: Policy, config: RunConfig) -> None:
    """Check how many numbers a run trains, before any of them is made.

    Args:
        policy: the site's.
        config: the run config as the site carries it out, with its own base model.

    Raises:
        PolicyError: if there are more than the policy allows.
        ModelError: for a base model or target modules that would not do.
    """
    if policy.largest_parameters is None:
        return
    count = adapter_size(config)
    if count > policy.largest_parameters:
        got = f"{count} numbers with adapter.rank and adapter.virtual_tokens"
        expected = f"at most {policy.largest_parameters}, which is policy.largest_parameters"
        raise _beyond("adapter.target_modules", got, expected)


def expect_base(policy: Policy, model: AdaptedModel) -> None:
    """Check that the site's own base model is one that the policy allows.

    Raises:
        PolicyError: if its weights have another fingerprint.
    """
    if policy.base_models and model.base.fingerprint not in {rule.sha256 for rule in policy.base_models}:
        raise PolicyError(
            "model.source",
            f"the site's base model has SHA-256 {model.base.fingerprint}; expected one of policy.base_models. Restore "
            "the model, or allow it.",
        )


Rule = Callable[[Policy, RunConfig], str | None]


def _source(policy: Policy, config: RunConfig) -> str | None:
    named = [rule.id for rule in policy.base_models]
    if not named or None in named or config.model.source in named:
        return None
    return f"one of {_listed(named)}, which policy.base_models names"


def _released(metric: str, asked: bool, policy: Policy) -> str | None:
    return f"{metric!r} in policy.metrics for that" if asked and metric not in policy.metrics else None


def _within(value: float, largest: float | None, key: str) -> str | None:
    return None if largest is None or value <= largest else f"at most {largest:g}, which is policy.{key}"


def _among(value: str, allowed: Sequence[str] | None, key: str) -> str | None:
    return None if allowed is None or value in allowed else f"one of {_listed(allowed)}, which is policy.{key}"


RULES: dict[str, Rule] = {
    "model.source": _source,
    "data.task": lambda policy, config: _among(config.data.task, policy.tasks, "tasks"),
    "adapter.kind": lambda policy, config: _among(config.adapter.kind, policy.adapters, "adapters"),
    "adapter.rank": lambda policy, config: _within(
        config.adapter.rank if config.adapter.kind == "lora" else 0, policy.largest_rank, "largest_rank"
    ),
    "adapter.virtual_tokens": lambda policy, config: _within(
        config.adapter.virtual_tokens if config.adapter.kind == "prompt" else 0,
        policy.largest_virtual_tokens,
        "largest_virtual_tokens",
    ),
    "aggregation.method": lambda policy, config: _among(config.aggregation.method, policy.methods, "methods"),
    "federation.rounds": lambda policy, config: _within(
        config.federation.rounds, policy.largest_rounds, "largest_rounds"
    ),
    "training.local_steps": lambda policy, config: _within(
        config.training.local_steps or 0, policy.largest_steps_per_round, "largest_steps_per_round"
    ),
    "privacy.noise_multiplier": lambda policy, config: _least_noise(policy, config),
    "privacy.delta": lambda policy, config: _within(config.privacy.delta, policy.largest_delta, "largest_delta"),
    "privacy.release_loss": lambda policy, config: _released("train_loss", config.privacy.release_loss, policy),
    "privacy.clipping": lambda policy, config: _released("clip_norm", config.privacy.clipping == "adaptive", policy),
}
"""By key of the run config: what was expected there, or None where it is within the policy."""


def _least_noise(policy: Policy, config: RunConfig) -> str | None:
    given, least = config.privacy.noise_multiplier, policy.least_noise_multiplier
    if given is None or least is None or given >= least:
        return None
    return f"at least {least:g}, which is policy.least_noise_multiplier"


def _planned_from(config: RunConfig) -> str:
    """Name the keys that noise and ε of a run follow from."""
    privacy, training = config.privacy, config.training
    target = "privacy.epsilon, privacy.delta" if privacy.target_epsilon is not None else "privacy.noise_multiplier"
    rate = "privacy.sample_rate" if privacy.sample_rate is not None else "training.batch_size"
    length = "training.local_steps" if training.local_steps is not None else "training.local_epochs"
    return f"{target}, privacy.accountant, {rate}, {length}, federation.rounds"


@lru_cache(maxsize=64)
def _epsilon(charges: tuple[Charge, ...], budget: Budget) -> float:
    return epsilon_of(charges, budget)


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _beyond(key: str, got: object, expected: str) -> PolicyError:
    shown = got if isinstance(got, str) and " " in got else repr(got)
    return PolicyError(
        key, f"{key} of the run is {shown[: _SHOWN * 3]}; expected {expected}. Leave the run, or change the policy."
    )
