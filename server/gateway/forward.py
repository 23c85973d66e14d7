"""What the gateway forwards: POST to one method of the fleet API, streamed both ways. Everything else is not found.

The path is matched as it came, before anything is decoded, and written anew for the SuperLink: what is no plain method
name of the fleet API never gets there, whatever it would decode to.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.gateway.rate import Rate
from server.gateway.refusals import Refusals
from server.server_config import LimitsConfig

FLEET_METHOD = re.compile(rb"/v1/fleet/([a-z]{1,32}(?:-[a-z]{1,32}){0,4})")
HOP_BY_HOP = frozenset(
    b"connection host keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
NOT_FORWARDED = HOP_BY_HOP | {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"expect"}
TRY_AGAIN = 503
"""What a site is told whose request would be taken later or over a better link. Flower's SuperNode repeats a request
after 502, 503, 504 or a broken connection; after 408 or 429 it would drop the update that it was sending."""


class _RefusedError(Exception):
    """A request that is given up with a status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Gateway:
    """The ASGI application.

    Args:
        upstream: sends requests to the SuperLink; closed by the caller.
        limits: what a peer may do.
        refusals: told of each request that is not answered as asked.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        upstream: httpx.AsyncClient,
        limits: LimitsConfig,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._upstream, self._limits, self._refusals, self._clock = upstream, limits, refusals, clock
        self._rate = Rate(limits.requests_per_s, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = await self._answer(request)
        with contextlib.suppress(ClientDisconnect, TimeoutError, httpx.HTTPError, httpx.StreamError):
            async with asyncio.timeout(self._limits.request_timeout_s):  # a peer may also read slowly
                await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        peer = request.client.host if request.client else "unknown"
        try:
            await self._take_turn(peer)  # before all else, so that no answer is beyond the rate
            method = self._admit(request)
            async with asyncio.timeout(self._limits.request_timeout_s):
                return await self._forward(request, method)
        except _RefusedError as refused:
            status, why = refused.status, str(refused)
        except TimeoutError:
            status, why = TRY_AGAIN, "took too long"
        except (httpx.HTTPError, httpx.StreamError) as error:
            status, why = TRY_AGAIN, f"the SuperLink did not answer: {type(error).__name__}"
        except ClientDisconnect:
            return _end(400)
        self._refusals.note(peer, f"{status} {why}", request.scope["raw_path"])
        return _end(status)

    async def _take_turn(self, peer: str) -> None:
        """Wait for the peer's turn."""
        delay_s = self._rate.delay_s(peer, self._clock(), self._limits.queue_timeout_s)
        if delay_s is None:
            raise _RefusedError(TRY_AGAIN, "over the rate")
        if delay_s:
            await asyncio.sleep(delay_s)

    def _admit(self, request: Request) -> str:
        """Return the method of the fleet API that a request asks for, whose body may be as long as it says."""
        method = fleet_method(request)
        if method is None:
            raise _RefusedError(404, "not found")
        declared = request.headers.get("content-length", "0")
        if int(declared) > self._limits.body_bytes:  # h11 has seen to it that it is a number
            raise _RefusedError(413, "declared body over the limit")
        return method

    async def _forward(self, request: Request, method: str) -> Response:
        headers = [(name, value) for name, value in request.headers.raw if name not in NOT_FORWARDED]
        sent = self._upstream.build_request(
            "POST", f"/v1/fleet/{method}", headers=headers, content=self._body(request.stream())
        )
        answer = await self._upstream.send(sent, stream=True)
        kept = {k.decode(): v.decode("latin-1") for k, v in answer.headers.raw if k.lower() not in HOP_BY_HOP}
        return StreamingResponse(_relayed(answer), answer.status_code, kept)

    async def _body(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a body on, up to the limit, as long as it keeps coming."""
        got = 0
        while True:
            try:
                async with asyncio.timeout(self._limits.idle_timeout_s):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise _RefusedError(TRY_AGAIN, "the body stopped coming") from None
            if piece is None:
                return
            got += len(piece)
            if got > self._limits.body_bytes:
                raise _RefusedError(413, "body over the limit")
            yield piece


def fleet_method(request: Request) -> str | None:
    """Return the method of the fleet API that a request asks for, None for everything else."""
    if request.method != "POST" or request.scope.get("query_string"):
        return None
    matched = FLEET_METHOD.fullmatch(request.scope["raw_path"])
    return matched[1].decode("ascii") if matched else None


async def _relayed(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def _end(status: int) -> Response:
    """Return a refusal that tells nothing but its number, and closes: the rest of the request is not read."""
    return Response(status_code=status, headers={"connection": "close"})


def new_gateway(upstream: httpx.AsyncClient, limits: LimitsConfig, refusals: Refusals) -> Starlette:
    """Return the application with a life of its own: it tells of refusals, and closes ``upstream`` when it ends."""

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        async with upstream, refusals.told():
            yield

    app = Starlette(lifespan=life)
    app.mount("/", Gateway(upstream, limits, refusals))
    return app
