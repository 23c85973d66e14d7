"""The gateway's process: ``python -m server.gateway.serve STATE``."""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import uvicorn

from server.gateway.accept import BACKLOG, AcceptLoop, allow_open_files
from server.gateway.forward import new_gateway
from server.gateway.protocol import protocol_of
from server.gateway.rate import Connections
from server.gateway.refusals import Refusals
from server.server_config import LimitsConfig, ServerConfig
from server.state_folder import StateFolder

STOP_S = 5


def upstream_client(authority: Path, port: int, limits: LimitsConfig) -> httpx.AsyncClient:
    """Return a client of the SuperLink that takes nobody else for it: it knows the federation's authority alone."""
    context = ssl.create_default_context(cafile=str(authority))
    return httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{port}", verify=context, timeout=limits.upstream_timeout_s, trust_env=False,
        limits=httpx.Limits(max_connections=limits.connections), follow_redirects=False,
    )  # fmt: skip


def gateway_server(state: StateFolder, config: ServerConfig) -> tuple[uvicorn.Server, Callable[[], AcceptLoop]]:
    """Return the server, not yet running, and what makes the event loop to run it on."""
    limits, refusals = config.limits, Refusals()
    settings = uvicorn.Config(
        new_gateway(upstream_client(state.ca_certificate, config.superlink_port, limits), limits, refusals),
        host=config.listen, port=config.port,
        ssl_certfile=str(state.certificate("gateway")), ssl_keyfile=str(state.key("gateway")),
        http=protocol_of(limits.header_timeout_s, refusals), ws="none", lifespan="on", backlog=BACKLOG,
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=limits.connections + 1,  # uvicorn refuses from this number on; more are never accepted
        timeout_keep_alive=int(max(1, limits.idle_timeout_s)), timeout_graceful_shutdown=STOP_S,
        access_log=False, log_config=None, server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    peers = Connections(limits.connections_per_peer, limits.connections)
    return uvicorn.Server(settings), partial(AcceptLoop, limits.handshake_timeout_s, peers, refusals)


def main() -> None:
    """Serve until told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    state = StateFolder.open(Path(sys.argv[1]))
    config = state.config()
    allow_open_files(config.limits.connections)
    server, loop = gateway_server(state, config)
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(server.serve())
    sys.exit(0 if server.started else 1)


if __name__ == "__main__":
    main()
