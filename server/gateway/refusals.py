"""The gateway's log of what it turns away: bounded, however much there is of it.

Whoever reaches the port may be refused as often as they like. Of each kind and address the first is a line, and once a
minute their number is; the same holds for what uvicorn and asyncio have to say about connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

logger = logging.getLogger(__name__)

EVERY_S = 60.0
MOST_PAIRS = 100
"""Kinds of one address that are told apart in a minute; the rest is counted together."""
FOREIGN_LOGGERS = ("uvicorn.error", "asyncio")
_LONGEST_KIND = 200


class Sample:
    """Lets the first of a kind and address through, and counts the others until they are told."""

    def __init__(self) -> None:
        self._more: dict[tuple[str, str], int] = {}
        self._rest = 0

    def is_first(self, who: str, kind: str) -> bool:
        """Count one and return whether it is the first, which is to be told at once."""
        pair = (who, kind)
        if pair in self._more:
            self._more[pair] += 1
            return False
        if len(self._more) >= MOST_PAIRS:
            self._rest += 1
            return False
        self._more[pair] = 0
        return True

    def counts(self) -> list[str]:
        """Return a line for each count there is, and begin anew."""
        lines = [f"{who}: {kind}: {more} more" for (who, kind), more in self._more.items() if more]
        if self._rest:
            lines.append(f"{self._rest} more, of other kinds or addresses")
        self._more, self._rest = {}, 0
        return lines


class Refusals:
    """What the gateway refused, for its log."""

    def __init__(self) -> None:
        self._ours, self._foreign = Sample(), Sample()

    def note(self, peer: str, kind: str, detail: str | bytes | None = None) -> None:
        """Count a refusal; tell it if it is the first.

        Args:
            peer: address of the peer.
            kind: what it was refused for; a text of ours, as what peers send would make kinds without end.
            detail: more about the first one; escaped, and cut to 80 characters.
        """
        if self._ours.is_first(peer, kind):
            logger.info("%s: %s%s", peer, kind, "" if detail is None else f": {detail!r:.80}")

    def lets_through(self, record: logging.LogRecord) -> bool:
        """Whether a warning or error of :data:`FOREIGN_LOGGERS` is the first of its kind; for ``addFilter``."""
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0] if record.exc_info else None
        kind = str(record.msg).partition("\n")[0][:_LONGEST_KIND]
        return self._foreign.is_first(record.name, kind if error is None else f"{kind} ({error.__name__})")

    def tell_counts(self) -> None:
        """Log how many more there were than were told."""
        for line in (*self._ours.counts(), *self._foreign.counts()):
            logger.info("%s", line)

    @contextlib.asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Keep the log bounded, and tell the counts each minute and at the end."""
        for name in FOREIGN_LOGGERS:
            logging.getLogger(name).addFilter(self.lets_through)
        telling = asyncio.create_task(self._tell_for_ever())
        try:
            yield
        finally:
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling
            for name in FOREIGN_LOGGERS:
                logging.getLogger(name).removeFilter(self.lets_through)
            self.tell_counts()

    async def _tell_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            self.tell_counts()
