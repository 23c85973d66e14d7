"""The hash chain over a ledger's events: each one holds the hash of everything before it.

Hash number n is SHA-256 over (hash n - 1, n, kind, body). So an event that is altered, moved, put in or taken out
breaks the chain at its place, and the head (number and hash of the last event, kept apart) tells of a lost tail. The
chain is not keyed: whoever can write the file can write a whole new one. Against that, compare the head hash that
``fedtune-client ledger`` prints with one noted elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

START = "0" * 64
"""The hash before the first event."""


@dataclass(frozen=True)
class Link:
    """One event as stored: number from 1, kind, canonical JSON, hash in hexadecimal digits."""

    seq: int
    kind: str
    body: str
    hash: str


def link_hash(previous: str, seq: int, kind: str, body: str) -> str:
    """Return the hash of an event that follows the one with hash ``previous``."""
    return hashlib.sha256(f"{previous}\n{seq}\n{kind}\n{body}".encode()).hexdigest()


def find_break(links: Sequence[Link], head: tuple[int, str] | None) -> str | None:
    """Return what is wrong with a chain, naming the event, or None for a sound one.

    Args:
        links: all events, by number.
        head: number and hash of the last event, as kept apart; None if that is missing.
    """
    previous = START
    for expected, link in enumerate(links, start=1):
        if link.seq != expected:
            return f"event {expected} is missing"
        if link.hash != link_hash(previous, link.seq, link.kind, link.body):
            return f"event {link.seq} does not follow from event {link.seq - 1}: altered, moved or put in"
        previous = link.hash
    if head is None or not links:
        return "the last event is unknown"
    if head[0] > len(links):
        return f"event {len(links) + 1} is missing: the last one was {head[0]}"
    if head != (len(links), previous):
        return f"event {len(links)} is not the last one that was written"
    return None
