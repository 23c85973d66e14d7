"""What a run would spend at one site: from noise, rate, steps and rounds to ε, and from ε back to noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from client.ledger.events import Charge
from client.ledger.spending import charge_of, epsilon_of, steps_left
from client.site_config import Budget
from common.config.run import RunConfig
from common.errors import ConfigError, PrivacyError
from common.privacy.accounting import calibrate_noise
from common.privacy.advice import advise
from common.privacy.planning import Mechanism, plan_mechanism

TARGETS = (1.0, 2.0, 4.0, 8.0)
_MARKS = (1, 2, 5)


def plan_run(
    config: RunConfig, num_units: int, spent: Sequence[Charge] = (), budget: Budget | None = None
) -> dict[str, Any]:
    """Return the plan of a run at a site as plain values.

    Args:
        config: the run config.
        num_units: records of the site, or persons for unit user.
        spent: what the site's ledger holds against its rows.
        budget: the site's, where there is one.

    Raises:
        ConfigError: if sites add no noise in this run.
        PrivacyError: if the run's own target cannot be planned, or the site's budget cannot count its unit.
    """
    mechanism = plan_mechanism(config, num_units)
    if mechanism is None:
        raise ConfigError(
            f"privacy.unit is {config.privacy.unit!r}: sites add no noise, so that there is nothing to plan; expected "
            "'example' or 'user'."
        )
    rounds = config.federation.rounds
    plan: dict[str, Any] = {
        "name": config.name,
        "unit": mechanism.unit,
        "units_at_site": num_units,
        "rounds": rounds,
        "steps_per_round": mechanism.steps_per_round,
        "sample_rate": mechanism.sample_rate,
        "noise_multiplier": mechanism.noise_multiplier,
        "delta": mechanism.delta,
        "accountant": mechanism.accountant,
        "epsilon_after": [
            {
                "rounds": count,
                "steps": count * mechanism.steps_per_round,
                "epsilon": mechanism.epsilon_after(count),
                "epsilon_with_ledger": _with_ledger(mechanism, count, spent, budget),
            }
            for count in _milestones(rounds)
        ],
        "noise_for": [{"epsilon": target, "noise_multiplier": _noise(mechanism, rounds, target)} for target in TARGETS],
        "budget": None,
        "advice": list(advise(config, mechanism, num_units)),
    }
    if budget is not None:
        plan["budget"] = _left(mechanism, spent, budget)
        left = plan["budget"]["rounds_left"]
        if left < rounds:
            plan["advice"].append(
                f"The budget holds {left} of {rounds} rounds. A larger noise multiplier, fewer rounds or steps, or a "
                "smaller sample rate make it last."
            )
    return plan


def _milestones(rounds: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the number of rounds, and that number."""
    powers = (10**power for power in range(len(str(rounds))))
    return sorted({mark * power for power in powers for mark in _MARKS if mark * power < rounds} | {rounds})


def _with_ledger(mechanism: Mechanism, rounds: int, spent: Sequence[Charge], budget: Budget | None) -> float | None:
    if budget is None:
        return None
    return epsilon_of([*spent, charge_of(mechanism, rounds)], budget)


def _noise(mechanism: Mechanism, rounds: int, target: float) -> float | None:
    """Noise multiplier that spends ``target`` over the whole run; None where none does."""
    steps = rounds * mechanism.steps_per_round
    try:
        return calibrate_noise(target, mechanism.delta, mechanism.sample_rate, steps, mechanism.accountant)
    except PrivacyError:
        return None


def _left(mechanism: Mechanism, spent: Sequence[Charge], budget: Budget) -> dict[str, Any]:
    steps = steps_left(spent, charge_of(mechanism), budget)
    return budget.model_dump() | {
        "epsilon_spent": epsilon_of(spent, budget),
        "steps_left": steps,
        "rounds_left": steps // mechanism.steps_per_round,
    }
