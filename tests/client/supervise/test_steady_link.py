"""Flower's client over a link that breaks in a TLS handshake: it tries again, and gives up a wrong certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

import httpx
import pytest
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.supercore.retry import make_simple_http_retry_invoker

from client.supervise.steady_link import BROKE, PUSH, steady
from tests.server.gateway.running import running

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def breaking(*, held: bool) -> Iterator[tuple[int, list[int]]]:
    """A port where a handshake is begun and broken off, or held for as long as its caller waits; and how many came."""
    came: list[int] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                came.append(1)
                with connection:
                    while connection.recv(65536) and held:
                        pass

    with socket.create_server((LOOPBACK, 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield listener.getsockname()[1], came
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def asked(transport: httpx.BaseTransport, port: int, tries: int) -> httpx.Response:
    """Ask as Flower's SuperNode does, at most so often."""
    invoker = make_simple_http_retry_invoker()
    invoker.max_tries = tries
    with httpx.Client(transport=transport, timeout=0.5) as client:
        response: httpx.Response = invoker.invoke(client.post, f"https://{LOOPBACK}:{port}/v1/fleet/pull-messages")
        return response


class Steady(httpx.HTTPTransport):
    """A transport as the SuperNode has it."""

    handle_request = steady(httpx.HTTPTransport.handle_request)


@pytest.mark.parametrize("held", [False, True], ids=["closed", "silent"])
def test_link_that_breaks_in_a_handshake_is_tried_again(held: bool) -> None:
    with breaking(held=held) as (port, came):
        with pytest.raises(httpx.TransportError, match=BROKE):
            asked(Steady(), port, 2)
        assert len(came) == 2


def test_flower_alone_gives_it_up() -> None:
    """What the module is for: remove it when this fails."""
    with breaking(held=False) as (port, came):
        with pytest.raises(httpx.TransportError, match="SSL"):
            asked(httpx.HTTPTransport(), port, 2)
        assert len(came) == 1


def test_certificate_that_does_not_verify_is_given_up() -> None:
    with running() as gateway, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        asked(Steady(verify=ssl.create_default_context()), gateway.config.port, 100)


def test_answer_over_a_good_link_arrives_whole() -> None:
    with running() as gateway:
        answer = asked(Steady(verify=gateway.trusting()), gateway.config.port, 1)
    assert answer.status_code == 200
    assert len(answer.text) == 64


def refused(request: httpx.Request) -> httpx.Response:
    """What the SuperLink says to a piece that it has."""
    return httpx.Response(200, content=PushObjectResponse(stored=False).SerializeToString())


@pytest.mark.parametrize("path", [PUSH, "/v1/fleet/push-messages"])
def test_piece_that_was_sent_before_without_an_answer_counts_as_stored(path: str) -> None:
    broken = [True]

    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if broken.pop() if broken else False:
            raise httpx.ReadError("EOF")
        return refused(request)

    class Breaks(httpx.HTTPTransport):
        handle_request = steady(handle)

    with httpx.Client(transport=Breaks()) as client:
        url = f"https://{LOOPBACK}{path}"
        with pytest.raises(httpx.ReadError, match=BROKE):
            client.post(url, content=b"one")
        stored = [
            PushObjectResponse.FromString(client.post(url, content=body).content).stored for body in (b"one", b"two")
        ]
    assert stored == [path == PUSH, False]  # what was not tried before is refused as it was
