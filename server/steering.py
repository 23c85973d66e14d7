"""What may change between rounds: whether the next one begins, whom it asks, how long it waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.serverapp import Grid


class Steering:
    """Lets a run go as it is configured. The round loop asks before each round; override what steers it."""

    def proceed(self, number: int, grid: Grid) -> bool:
        """Return whether round ``number`` begins, once that is decided; False ends the run as if it were complete."""
        return True

    def ends(self) -> bool:
        """Return whether the run ends with the round in progress."""
        return False

    def sites_per_round(self, configured: int | None) -> int | None:
        """Return how many sites a round asks, None for all."""
        return configured

    def round_timeout_s(self, configured: float) -> float:
        """Return the seconds after which a round goes on with the updates it has."""
        return configured
