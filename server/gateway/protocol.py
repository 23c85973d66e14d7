"""HTTP/1.1 connections that do not wait for slow peers: uvicorn's, with a time limit for headers.

uvicorn limits how long a connection may be kept between requests, but not how long the header of a request may take:
a peer that sends a byte now and then would hold a connection for ever ("slow loris").
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from server.gateway.refusals import Refusals


class PatientlessProtocol(H11Protocol):
    """Closes connections whose header takes too long."""

    header_timeout_s: float
    """Seconds for a header."""
    refusals: Refusals
    """Told of each that is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for its first header."""
        super().connection_made(transport)
        self._peer = self.client[0] if self.client else "unknown"
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget its time."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a header that has begun must end in time."""
        super().data_received(data)
        if self._awaits_header():
            self._start_timer()
        else:
            self._stop_timer()

    def _awaits_header(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout_s, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self._awaits_header() and not self.transport.is_closing():
            self.refusals.note(self._peer, "no header in time: closed")
            self.transport.abort()


def protocol_of(header_timeout_s: float, refusals: Refusals) -> type[PatientlessProtocol]:
    """Return a class of connections with what it needs, as uvicorn wants a class."""
    has: dict[str, Any] = {"header_timeout_s": header_timeout_s, "refusals": refusals}
    return type("GatewayProtocol", (PatientlessProtocol,), has)
