"""What every engine speaks: requests to virtual sites, their answers, and the two protocols between them.

::

    round loop ─ Grid ─ VirtualGrid ─ Engine ─┬─ Handler             inprocess
                                              ├─ bytes ─ Handler     processes, one handler each
                                              └─ bytes ─ Handler     ray, one handler an actor

An engine decides *where* a request is handled and in which order; a handler decides *how*. A handler takes up to
``most`` requests at once, which is the seam for one that trains several virtual sites in one pass: it is written once
and works behind every engine. What the round loop computes does not depend on the order of answers, so that neither
engine nor number of workers can change a result; a handler must answer each request as if it had come alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """A message to a virtual site.

    Attributes:
        ticket: unique in an engine's life.
        node: number of the virtual site, from 0.
        kind: Flower's message type, "query" or "train".
        header: as it travels.
        payload: as it travels; requests of a round share one object.
    """

    ticket: int
    node: int
    kind: str
    header: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A virtual site's reply.

    Attributes:
        ticket: of the request.
        header: as it travels.
        payload: as it travels.
        failure: why there is no reply; None where there is one.
    """

    ticket: int
    header: bytes = b""
    payload: bytes = b""
    failure: str | None = None


class Handler(Protocol):
    """Answers requests in the process it lives in, with one resident base model."""

    @property
    def most(self) -> int:
        """Most requests it takes at once; 1 for a handler that gains nothing from more."""

    def handle(self, requests: Sequence[Request]) -> Iterable[Answer]:
        """Yield one answer to each of 1 to ``most`` requests, of any kind and in any order, as soon as it is there."""


class Engine(Protocol):
    """Has requests handled and gives back the answers.

    Law, which one test suite holds every engine to: each ticket submitted is collected exactly once, as an answer or as
    a failure; :meth:`collect` gives nothing only when nothing is outstanding; memory does not grow with the number of
    requests outstanding; after :meth:`close` no process of the engine lives.
    """

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Returns at once; nothing needs to be handled before :meth:`collect`."""

    def collect(self) -> list[Answer]:
        """Wait until at least one outstanding request is answered and return the answers that are there.

        Raises:
            RunError: where the engine's workers cannot be started.
        """

    def close(self) -> None:
        """Give up what is outstanding and end all workers, at once; may be called twice."""
