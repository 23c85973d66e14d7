"""Where adaptive clipping goes on: the clip norms that a round's sites ended at, each held to what its steps can do.

No site can be checked on what it tells. A step multiplies the clip norm C by exp(-η (b̃ - γ)), with b̃ a noisy share
(Andrew et al. 1905.03871, algorithm 1), which without noise is in [0, 1]: what is told is cut to within exp(±η) for
each step from what was sent, and of several the median counts. So one site alone, an honest one with much noise
included, moves C no further than a round without noise could, and fewer than half of many cannot move it beyond the
others'.
"""

from __future__ import annotations

import math
from statistics import median

from common.config.privacy import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM, PrivacyConfig
from server.late import Asked


class ToldNorms:
    """The clip norms of a round.

    Args:
        privacy: the run's settings.
    """

    def __init__(self, privacy: PrivacyConfig) -> None:
        self._privacy = privacy
        self._logarithms: dict[str, float] = {}

    def tell(self, asked: Asked, norm: float) -> None:
        """Take the clip norm that a site ended at after the steps that it had planned."""
        planned = asked.member.description.mechanism
        sent = math.log(asked.request.clip_norm or self._privacy.clip_norm)
        reach = self._privacy.clip_lr * (planned.steps if planned else 0)
        self._logarithms[asked.member.name] = min(sent + reach, max(sent - reach, math.log(norm)))

    def forget(self, site: str) -> None:
        """Take back what a site told."""
        self._logarithms.pop(site, None)

    def forget_all(self) -> None:
        """Take back what all told."""
        self._logarithms.clear()

    def next(self) -> float | None:
        """Return where the next round starts; None where no site told."""
        if not self._logarithms:
            return None
        middle = math.exp(median(self._logarithms.values()))
        return min(LARGEST_CLIP_NORM, max(SMALLEST_CLIP_NORM, middle))
