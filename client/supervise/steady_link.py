"""A SuperNode's link: one that breaks while TLS shakes hands is not taken for a wrong certificate.

Flower repeats a request for ever when the link breaks, except where the error's text names SSL: it gives up then, drops
the update that it was sending, and ends. That is right for a certificate; but a link that breaks, or is too slow, while
TLS shakes hands reads so too (an end of file, a time-out). Such errors get another text here, in httpx, which Flower's
client uses; certificates that do not verify, and peers that speak no TLS, are given up as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import httpx

BROKE = "the link broke or was too slow"

_Handle = Callable[[httpx.HTTPTransport, httpx.Request], httpx.Response]


def steady(handle: _Handle) -> _Handle:
    """Return a transport's ``handle_request`` whose errors say :data:`BROKE` where the link was at fault."""

    @functools.wraps(handle)
    def handled(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        with _told_apart():
            response = handle(transport, request)
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _SteadyStream(response.stream)
        return response

    return handled


class _SteadyStream(httpx.SyncByteStream):
    """The body of an answer, which may break off as well."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _told_apart():
            yield from self._stream

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        if isinstance(error, httpx.TimeoutException) or "EOF" in str(error):
            raise type(error)(BROKE) from None
        raise


def make_steady() -> None:
    """Have every httpx client of this process tell a broken link from a wrong certificate."""
    httpx.HTTPTransport.handle_request = steady(httpx.HTTPTransport.handle_request)  # type: ignore[method-assign,assignment]
