"""A gateway and what stands behind it, both real servers with TLS on the loopback address."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.types import Receive, Scope, Send

from server.gateway.serve import gateway_server
from server.server_config import ServerConfig
from server.state_folder import StateFolder
from tests.server.coordinator import LOOPBACK, coordinator, limits

START_S = 120


@dataclass
class Upstream:
    """Stands where the SuperLink does: answers with the digest of what it got, and keeps what it was asked."""

    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answer: bytes = b""
    first_piece: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], headers))
        digest, more = hashlib.sha256(), True
        while more:
            message = await receive()
            digest.update(message.get("body", b""))
            self.first_piece.set()
            more = message.get("more_body", False)
        body = self.answer or digest.hexdigest().encode()
        sent = [(b"x-upstream", b"yes"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": sent})
        half = len(body) // 2
        await send({"type": "http.response.body", "body": body[:half], "more_body": True})
        if self.answer:
            await asyncio.to_thread(self.go_on.wait, START_S)
        await send({"type": "http.response.body", "body": body[half:]})


@dataclass
class Running:
    """A gateway that serves, what is behind it, the coordinator's files, and where connections come from."""

    state: StateFolder
    config: ServerConfig
    upstream: Upstream = field(default_factory=Upstream)
    source: str = LOOPBACK

    def trusting(self) -> ssl.SSLContext:
        """TLS that takes the federation's gateway alone."""
        return ssl.create_default_context(cafile=str(self.state.ca_certificate))

    def client(self) -> httpx.Client:
        """An HTTP client of the gateway."""
        return httpx.Client(
            base_url=f"https://{LOOPBACK}:{self.config.port}", verify=self.trusting(), trust_env=False, timeout=START_S
        )

    def plain(self) -> socket.socket:
        """A TCP connection that has not said anything."""
        return socket.create_connection((LOOPBACK, self.config.port), timeout=START_S, source_address=(self.source, 0))

    @contextlib.contextmanager
    def connection(self) -> Iterator[ssl.SSLSocket]:
        """A TLS connection to write on byte by byte."""
        with (
            self.plain() as plain,
            self.trusting().wrap_socket(plain, server_hostname=LOOPBACK) as secure,
        ):
            yield secure

    def raw(self, request: bytes) -> bytes:
        """Send bytes and return all that comes back until the gateway closes."""
        with self.connection() as secure:
            secure.sendall(request)
            return read_to_end(secure)


def drip(secure: ssl.SSLSocket, head: bytes) -> bytes:
    """Send a header that never ends, a line now and then, and return what comes before the other side closes."""
    secure.settimeout(0.2)
    secure.sendall(head)
    while True:
        try:
            secure.sendall(b"x: y\r\n")
            return secure.recv(100)
        except TimeoutError:
            continue
        except (ConnectionError, ssl.SSLError):
            return b""


def overflow(secure: ssl.SSLSocket, head: bytes, size_bytes: int) -> bytes:
    """Send a body of undeclared length, for as long as the other side takes it, and return what comes back."""
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # it closes on whoever goes on sending
        secure.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(size_bytes // 65536):
            secure.sendall(piece)
    return read_to_end(secure)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the other side closes, in whatever way."""
    got = bytearray()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := connection.recv(65536):
            got += piece
    return bytes(got)


@contextlib.contextmanager
def running(upstream_of: str = "superlink", **changes: Any) -> Iterator[Running]:
    """Serve with some of the gateway's limits changed.

    Args:
        upstream_of: whose certificate the server behind the gateway shows.
        changes: to the limits.
    """
    with coordinator(limits=limits(**changes)) as state, contextlib.ExitStack() as ends:
        config, upstream = state.config(), Upstream()
        behind = uvicorn.Config(
            upstream, host=LOOPBACK, port=config.superlink_port, log_config=None, lifespan="off", ws="none",
            ssl_certfile=str(state.certificate(upstream_of)), ssl_keyfile=str(state.key(upstream_of)),
        )  # fmt: skip
        ends.enter_context(serving(uvicorn.Server(behind), asyncio.new_event_loop))
        ends.enter_context(serving(*gateway_server(state, config)))
        ends.callback(upstream.go_on.set)
        yield Running(state, config, upstream)


@contextlib.contextmanager
def serving(server: uvicorn.Server, loop: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[None]:
    """Run a server in a thread, and end it."""

    def serve() -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive()
