"""Connections as they are accepted: counted, limited and given little time before TLS has begun.

uvicorn knows a connection from the end of its TLS handshake on, and asyncio gives a handshake a minute: until then a
peer that says nothing would cost a file and be under no limit.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any

from server.gateway.rate import Connections
from server.gateway.refusals import Refusals

logger = logging.getLogger(__name__)

BACKLOG = 512
"""Connections that may wait to be accepted; asyncio accepts as many in one go, before the first of them is counted."""
SPARE_FILES = 64
"""Open files of the gateway that are no connections, with some to spare."""


class AcceptLoop(asyncio.SelectorEventLoop):
    """An event loop whose TLS servers close at once the connections that are too many.

    Args:
        handshake_timeout_s: seconds for a TLS handshake.
        peers: open connections, from accept until their sockets are closed.
        refusals: told of each that is closed.
    """

    def __init__(self, handshake_timeout_s: float, peers: Connections, refusals: Refusals) -> None:
        super().__init__()
        self._handshake_timeout_s, self._peers, self._refusals = handshake_timeout_s, peers, refusals

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Make a server; see asyncio."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", self._handshake_timeout_s)
        return await super().create_server(*args, **options)

    def _make_ssl_transport(
        self, rawsock: socket.socket, protocol: asyncio.Protocol, sslcontext: ssl.SSLContext, *args: Any, **options: Any
    ) -> asyncio.Transport:
        """Count a connection that was accepted; see asyncio, which calls it before the handshake."""
        make: Callable[..., asyncio.Transport] = super()._make_ssl_transport  # type: ignore[misc]
        if options.get("server") is None:
            return make(rawsock, protocol, sslcontext, *args, **options)
        peer = str(options["extra"]["peername"][0])
        if not self._peers.enter(peer):
            self._refusals.note(peer, "too many connections: closed")
            rawsock.close()
            raise ConnectionAbortedError(f"{peer} has too many connections")  # asyncio drops it without a word
        counted = _CountedSocket(rawsock, peer, self._peers)
        try:
            return make(counted, protocol, sslcontext, *args, **options)
        except BaseException:
            counted.close()
            raise


class _CountedSocket(socket.socket):
    """An accepted socket that counts for its peer until it is closed, whatever it is that closes it.

    Args:
        accepted: what it takes the place of.
        peer: address of the peer.
        peers: where the peer has entered.
    """

    def __init__(self, accepted: socket.socket, peer: str, peers: Connections) -> None:
        super().__init__(fileno=accepted.detach())
        self.setblocking(False)
        self._peer: str | None = peer
        self._peers = peers

    def close(self) -> None:
        """Close it and count one less."""
        super().close()
        if self._peer is not None:
            self._peers.leave(self._peer)
            self._peer = None


def allow_open_files(connections: int) -> None:
    """Let this process have the files that its connections need, as far as the system's hard limit goes.

    Args:
        connections: most at a time; each may have one to the SuperLink.
    """
    wanted = 2 * connections + BACKLOG + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "the system allows %d open files; expected %d for limits.connections of %d. Raise it (ulimit -Hn, "
            "LimitNOFILE) or lower limits.connections.", hard, wanted, connections,
        )  # fmt: skip
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
