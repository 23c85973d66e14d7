"""How many requests and connections a peer address may have."""

from __future__ import annotations

from collections import Counter

MOST_PEERS = 10_000
"""Peers whose rate is remembered; beyond, those that have been quiet are forgotten."""


class Rate:
    """A token bucket for each peer: ``burst`` requests at once, ``per_s`` a second after that.

    Args:
        per_s: tokens a second.
        burst: size of a bucket.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: dict[str, tuple[float, float]] = {}

    def delay_s(self, peer: str, now_s: float, longest_s: float) -> float | None:
        """Take a token and return the seconds to wait until it is there, or None, taking none, if beyond ``longest_s``.

        Args:
            peer: address of the peer.
            now_s: seconds of a monotonic clock.
            longest_s: longest wait.
        """
        tokens, at_s = self._buckets.get(peer, (float(self._burst), now_s))
        tokens = min(self._burst, tokens + (now_s - at_s) * self._per_s) - 1.0
        delay_s = max(0.0, -tokens / self._per_s)
        if delay_s > longest_s:
            return None
        self._buckets[peer] = (tokens, now_s)
        if len(self._buckets) > MOST_PEERS:
            self._forget(now_s)
        return delay_s

    def _forget(self, now_s: float) -> None:
        """Drop the buckets that are full again: they say the same as none."""
        full_s = self._burst / self._per_s
        self._buckets = {peer: kept for peer, kept in self._buckets.items() if now_s - kept[1] < full_s}


class Connections:
    """Counts open connections, by peer and in all.

    Args:
        most_of_peer: of one peer.
        most: in all.
    """

    def __init__(self, most_of_peer: int, most: int) -> None:
        self._most_of_peer, self._most = most_of_peer, most
        self._open: Counter[str] = Counter()

    def enter(self, peer: str) -> bool:
        """Count one more and return True, to be followed by :meth:`leave`; False, counting none, if it is too many."""
        if self._open[peer] >= self._most_of_peer or self._open.total() >= self._most:
            return False
        self._open[peer] += 1
        return True

    def leave(self, peer: str) -> None:
        """Count one less."""
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]
