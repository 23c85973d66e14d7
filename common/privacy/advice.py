"""What would help where a privacy plan is hopeless: too small a site, too low a rate, too much noise.

The yardstick is the noise in a step's mean gradient. Coordinate by coordinate it has deviation z C / (q N); over d
trained parameters its norm is about √d times that, while the mean of clipped gradients has at most norm C. Averaged
over K sites it falls by √K. Learning needs the sum over a run's T steps to stand out: signal T C at most, noise
√(T d) z C / (q N √K). Their ratio, :func:`signal_to_noise`, bounds what the plan can carry and promises nothing.
"""

from __future__ import annotations

import math

from common.config.run import RunConfig
from common.privacy.planning import Mechanism

HOPELESS, POOR = 1.0, 5.0
"""Below these signal-to-noise ratios expect hardly anything, or little. Gradients of a batch are far from aligned, so
that the true ratio is lower; along the direction of the signal alone the noise is √d times smaller. A rule of thumb."""
LOW_RATE, SMALL_SITE = 0.02, 100


def signal_to_noise(mechanism: Mechanism, rounds: int, num_parameters: int, num_sites: int = 1) -> float:
    """Return the largest ratio of summed gradient to summed noise over a run.

    Args:
        mechanism: of one site.
        rounds: of the run.
        num_parameters: d, trained parameters.
        num_sites: K sites alike that are averaged.
    """
    steps = rounds * mechanism.steps_per_round
    noise = mechanism.gradient_noise / mechanism.expected_batch_size
    return math.sqrt(steps * num_sites / num_parameters) / noise


def advise(
    config: RunConfig, mechanism: Mechanism, num_units: int, num_parameters: int | None = None, num_sites: int = 1
) -> tuple[str, ...]:
    """Return sentences on what keeps a plan from working and what would help; empty where nothing is wrong.

    Args:
        config: the run config.
        mechanism: planned for the site.
        num_units: records or persons of the site.
        num_parameters: trained parameters, where known.
        num_sites: sites that are averaged.
    """
    what = "persons" if mechanism.unit == "user" else "records"
    found = []
    if num_units < SMALL_SITE:
        found.append(
            f"The site has {num_units} {what}: too few for noise to average out. More sites in the run help"
            + ("." if config.adapter.kind == "head_only" else ", and so does a head alone (adapter.kind: head_only).")
        )
    if mechanism.sample_rate < LOW_RATE and num_units * LOW_RATE >= 1:
        found.append(
            f"The sample rate is {mechanism.sample_rate:.2g}: steps are small and noisy. Set privacy.sample_rate to "
            "0.05 to 0.2, which costs time, not budget at the same ε."
        )
    if num_parameters is not None:
        ratio = signal_to_noise(mechanism, config.federation.rounds, num_parameters, num_sites)
        if ratio < POOR:
            verdict = "will hardly learn" if ratio < HOPELESS else "will learn little"
            enough = math.ceil(num_units * POOR / ratio)
            found.append(
                f"At best the signal is {ratio:.1f} times the noise over the run, so it {verdict}. Any of these would "
                f"help: {enough:,} {what} at a site, fewer trained parameters (head_only, ffa_lora, a smaller rank; "
                f"now {num_parameters:,}), a larger ε, more sites."
            )
    if config.training.optimizer == "adamw" and config.training.lr < 1e-3:
        found.append(
            f"training.lr is {config.training.lr:g}: the commonest failure under DP is too low a rate. Take 3 to 10 "
            "times the one that works without."
        )
    return tuple(found)
