"""Flower's client over a link that breaks in a TLS handshake: it tries again, and gives up a wrong certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

import httpx
import pytest
from flwr.supercore.retry import make_simple_http_retry_invoker

from client.supervise.steady_link import BROKE, steady
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
