"""A SuperNode's link may break: in a TLS handshake, or between the last byte of a request and its answer.

Flower repeats a request for ever when the link breaks, except where the error's text names SSL: it gives up then, drops
the update that it was sending, and ends. That is right for a certificate; but a link that breaks, or is too slow, while
TLS shakes hands reads so too (an end of file, a time-out). Such errors get another text here, in httpx, which Flower's
client uses; certificates that do not verify, and peers that speak no TLS, are given up as before.

A piece of an update that the SuperLink has, but whose answer was lost, is refused when it is sent again ("the push
session may have expired or been replaced"), and Flower drops the update. Here a piece that is refused after an attempt
that ended without an answer counts as stored. Where it was not, the coordinator sees an update that lacks it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator

import httpx

BROKE = "the link broke or was too slow"
PUSH = "/v1/fleet/push-object"
STORED = b"\x08\x01"
"""Flower's PushObjectResponse with ``stored``; without it, it has no bytes."""

_Handle = Callable[[httpx.HTTPTransport, httpx.Request], httpx.Response]


def steady(handle: _Handle) -> _Handle:
    """Return a transport's ``handle_request`` whose errors say :data:`BROKE` where the link was at fault."""
    unanswered: set[bytes] = set()

    @functools.wraps(handle)
    def handled(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        piece = hashlib.sha256(request.read()).digest() if request.url.path == PUSH else b""
        try:
            with _told_apart():
                response = handle(transport, request)
        except httpx.TransportError:
            if piece:
                unanswered.add(piece)
            raise
        if piece and response.is_server_error:
            unanswered.add(piece)
        elif piece and response.is_success:
            with _told_apart():
                return _as_stored(response, again=piece in unanswered)
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _SteadyStream(response.stream)
        return response

    return handled


def _as_stored(response: httpx.Response, *, again: bool) -> httpx.Response:
    """Return the answer to a piece, read; a refusal of one that was sent before becomes the answer that got lost."""
    content = response.read()
    kept = {
        name: value for name, value in response.headers.items() if name not in ("content-length", "content-encoding")
    }
    return httpx.Response(response.status_code, headers=kept, content=content or (STORED if again else b""))


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
