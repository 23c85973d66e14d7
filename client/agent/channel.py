"""The way to the agent: forwards bytes over its socket and brings its answer back. Imports flwr and models not at all.

An agent that dies under a request is asked again when it is back: the ledger makes the same request the same round,
charged once and released once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import grpc

from client.agent.frames import ANSWERED, OPENING_BYTES, PIECE_BYTES, cut, join
from common.errors import RunError

SERVICE = "fedtune.Agent"
ASK, STATUS = f"/{SERVICE}/Ask", f"/{SERVICE}/Status"
OPTIONS = [("grpc.max_receive_message_length", PIECE_BYTES + OPENING_BYTES), ("grpc.enable_http_proxy", 0)]
MOST_SOCKET_BYTES = 100
"""Longest path of a socket: the system takes 107 bytes."""
TRIES = 3
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def ask(socket: Path, kind: str, parts: tuple[bytes, bytes, bytes], wait_s: float = 120.0) -> tuple[bytes, bytes]:
    """Ask the agent and return header and payload of its answer.

    Args:
        socket: the agent's.
        kind: "query" or "train".
        parts: run config as YAML text, header, payload.
        wait_s: seconds to wait for an agent that is not there, each time.

    Raises:
        RunError: if it is not there, or went away every time.
        WireError: for an answer that is none.
    """
    for left in reversed(range(TRIES)):
        try:
            with _open(socket, wait_s) as channel:
                answers = channel.stream_stream(ASK)(cut(kind, parts))
                _, (header, payload) = join(answers, ANSWERED)
                return header, payload
        except grpc.RpcError as error:
            if left == 0 or error.code() not in _GONE:
                raise RunError(f"the agent ended the call with {error.code().name}; expected an answer.") from None
            time.sleep(0.5)
    raise AssertionError  # the last try returns or raises


def status_of(socket: Path, wait_s: float = 2.0) -> dict[str, Any]:
    """Return what the agent says of itself; see :meth:`client.agent.resident.ResidentSite.status`.

    Raises:
        RunError: if it is not there.
    """
    try:
        with _open(socket, wait_s) as channel:
            answer: dict[str, Any] = json.loads(channel.unary_unary(STATUS)(b"", timeout=wait_s))
            return answer
    except grpc.RpcError as error:
        raise RunError(f"the agent at {socket} does not answer ({error.code().name}); expected its status.") from None


def _open(socket: Path, wait_s: float) -> Any:
    channel = grpc.insecure_channel(f"unix:{socket}", options=OPTIONS)
    try:
        grpc.channel_ready_future(channel).result(timeout=wait_s)
    except grpc.FutureTimeoutError:
        channel.close()
        raise RunError(f"no agent at {socket}; expected it to run. Start it: fedtune-client up SITE_CONFIG.") from None
    return channel
