"""What a ledger says, for people: what was spent by dataset and by run, and what is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from client.ledger.events import Charge
from client.ledger.history import Entry, History
from client.ledger.ledger import Ledger
from client.ledger.spending import epsilon_of, steps_left
from client.site_config import Budget
from common.errors import PrivacyError


def report_ledger(ledger: Ledger, budget: Budget, *, capped: bool) -> dict[str, Any]:
    """Verify a ledger and return what it holds, as plain values. Writes nothing.

    Args:
        ledger: the file, which must exist.
        budget: unit and δ that ε is counted by.
        capped: whether the budget's ε is a cap, so that there is something left.

    Raises:
        PrivacyError: if the file cannot be used or is broken.
    """
    events, head = ledger.verify()
    history = ledger.history()
    return {
        "ledger": str(ledger.path),
        "events": events,
        "head": head,
        "budget": budget.model_dump() | {"epsilon": budget.epsilon if capped else None},
        "datasets": [_dataset(history, number, budget, capped=capped) for number in history.datasets],
        "runs": [_run(*group, budget) for group in _by_run(history)],
    }


def largest_epsilon(history: History, budget: Budget) -> float | None:
    """Return the largest ε that a dataset has spent; None where the budget's unit cannot count one of them."""
    spent = [_epsilon(history.charges(history.sharing(number)), budget) for number in history.datasets]
    counted = [epsilon for epsilon in spent if epsilon is not None]
    return max(counted, default=0.0) if len(counted) == len(spent) else None


def _dataset(history: History, number: int, budget: Budget, *, capped: bool) -> dict[str, Any]:
    seen, near = history.datasets[number], history.sharing(number)
    charges = history.charges(near)
    epsilon = _epsilon(charges, budget)
    report = {
        "dataset": seen.fingerprint,
        "source": seen.source,
        "rows": seen.num_rows,
        "first_seen": seen.time,
        "shares_records_with": sorted({history.datasets[other].fingerprint for other in near - {number}}),
        "rounds_charged": len(charges),
        "epsilon_spent": epsilon,
    }
    if not capped:
        return report
    left = steps_left(charges, charges[-1], budget) if charges and epsilon is not None else None
    return report | {
        "epsilon_left": None if epsilon is None else max(0.0, budget.epsilon - epsilon),
        "steps_left_like_the_last": left,
        "rounds_left_like_the_last": None if left is None else left // charges[-1].steps,
    }


def _by_run(history: History) -> list[tuple[str, str, list[Entry]]]:
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in history.entries.values():
        groups.setdefault((entry.reserved.dataset, entry.reserved.run), []).append(entry)
    return [(history.datasets[number].fingerprint, run, entries) for (number, run), entries in groups.items()]


def _run(fingerprint: str, run: str, entries: list[Entry], budget: Budget) -> dict[str, Any]:
    reserved = [entry.reserved for entry in entries]
    return {
        "dataset": fingerprint,
        "run": run,
        "rounds": sorted(one.round for one in reserved),
        "without_release": sorted(entry.reserved.round for entry in entries if entry.committed is None),
        "unit": sorted({one.charge.unit for one in reserved}),
        "noise_multiplier": sorted({one.charge.noise_multiplier for one in reserved}),
        "sample_rate": sorted({one.charge.sample_rate for one in reserved}),
        "steps": sum(one.charge.steps for one in reserved),
        "epsilon_alone": _epsilon((one.charge for one in reserved), budget),
        "first": min(one.time for one in reserved),
        "last": max(one.time for one in reserved),
    }


def _epsilon(charges: Iterable[Charge], budget: Budget) -> float | None:
    """ε of charges, None where the budget's unit cannot count them."""
    try:
        return epsilon_of(charges, budget)
    except PrivacyError:
        return None
