"""From charges to ε against a site's budget: what is spent, whether a round fits, how many steps are left.

Units:

======================  ==================================  =====================================================
budget for              a run that protects examples        a run that protects persons ("user")
======================  ==================================  =====================================================
``example``             as it is                            with half its noise multiplier
``user``                refused: a person may have many     as it is
                        records
======================  ==================================  =====================================================

Why half: adding or removing one record leaves the person in the data and turns a clipped contribution of norm at most
C into another one of norm at most C, which are up to 2 C apart. Noise of standard deviation σ C is (σ / 2) (2 C). For
one step the subsampled Gaussian of sensitivity 2 C dominates that exchange for every ε ≥ 0 (its hockey-stick divergence
is at most q times that of two Gaussians 2 C apart, by joint convexity: Balle et al. 1807.01647, theorem 2); that it
also does over many steps is checked in numbers by a test, not proved.

ε is that of the PRV accountant at the budget's δ, whatever accountant the run plans with: one number for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from client.ledger.events import Charge
from client.site_config import Budget
from common.errors import PrivacyError
from common.privacy.accounting import Segment, epsilon_spent
from common.privacy.planning import Mechanism

_MOST_STEPS = 10**9


def charge_of(mechanism: Mechanism | None, rounds: int = 1) -> Charge:
    """Return what ``rounds`` rounds of a site's mechanism spend.

    Raises:
        PrivacyError: for a run in which the site itself adds no noise.
    """
    if mechanism is None or mechanism.unit == "site":
        raise PrivacyError(
            "the run adds no noise at the site, and this site has a budget; expected privacy.unit 'example' or 'user'. "
            "Leave the run."
        )
    return Charge(
        unit=mechanism.unit,
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=mechanism.sample_rate,
        steps=rounds * mechanism.steps_per_round,
    )


def segment_for(charge: Charge, budget: Budget) -> Segment:
    """Return what a charge adds to the history of one unit of the budget.

    Raises:
        PrivacyError: for a run that protects single records under a budget for persons.
    """
    if charge.unit == budget.unit:
        return Segment(charge.noise_multiplier, charge.sample_rate, charge.steps)
    if budget.unit == "example":
        return Segment(charge.noise_multiplier / 2, charge.sample_rate, charge.steps)
    raise PrivacyError(
        "the budget is for persons (unit 'user') but a run on these data protects single records ('example'), and a "
        "person may have many; expected privacy.unit 'user'. Change the run config, or the budget's unit."
    )


def epsilon_of(charges: Iterable[Charge], budget: Budget) -> float:
    """Return ε at the budget's δ for one unit of the budget.

    Raises:
        PrivacyError: for charges that the budget's unit cannot count, or that have no finite ε.
    """
    return epsilon_spent([segment_for(charge, budget) for charge in charges], budget.delta)


def fits(charges: Sequence[Charge], further: Charge, budget: Budget) -> bool:
    """Whether ``further`` may be spent after ``charges``."""
    return epsilon_of([*charges, further], budget) <= budget.epsilon


def steps_left(charges: Sequence[Charge], kind: Charge, budget: Budget) -> int:
    """Return the largest number of steps like those of ``kind`` that still fit after ``charges``.

    Args:
        charges: what was spent.
        kind: noise multiplier, sample rate and unit of the steps; its own number is only where the search starts.
        budget: the budget.

    Returns:
        n such that ε after n more steps is at most the budget's, and after n + 1 is not.
    """
    spent = [segment_for(charge, budget) for charge in charges]
    one = segment_for(kind.model_copy(update={"steps": 1}), budget)

    def epsilon_after(steps: int) -> float:
        return epsilon_spent([*spent, Segment(one.noise_multiplier, one.sample_rate, steps)], budget.delta)

    return _last_within(epsilon_after, budget.epsilon, kind.steps)


def _last_within(epsilon: Callable[[int], float], most: float, guess: int) -> int:
    """Return the largest n with ``epsilon(n) <= most`` (0 if there is none), for an increasing ``epsilon``.

    Doubling from ``guess`` gives a bracket, which interpolation and bisection narrow in turn: ε is nearly straight in n
    within it, and each evaluation takes about a second.
    """
    low, below, high, above = 0, epsilon(0), guess, epsilon(guess)
    if below > most:
        return 0
    while above <= most and high < _MOST_STEPS:
        low, below, high = high, above, 2 * high
        above = epsilon(high)
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (most - below) / (above - below)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        value = epsilon(middle)
        if value <= most:
            low, below = middle, value
        else:
            high, above = middle, value
        halve = not halve
    return low
