"""Connections are counted and limited from accept on, whether they say anything or not."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Iterator

import pytest

from server.gateway.accept import BACKLOG, SPARE_FILES, allow_open_files
from tests.server.coordinator import LOOPBACK
from tests.server.gateway.running import START_S, Running, read_to_end, running

PER_PEER, IN_ALL = 4, 6
NEVER_S = 3600.0
OTHER = "127.0.0.2"
ASKED = b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
has_other = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")


@pytest.fixture
def gateway() -> Iterator[Running]:
    """Nothing but a limit on connections would close one here."""
    with running(
        connections_per_peer=PER_PEER, connections=IN_ALL, handshake_timeout_s=NEVER_S, header_timeout_s=NEVER_S
    ) as made:
        yield made


def connected(gateway: Running, source: str = LOOPBACK) -> socket.socket:
    """A TCP connection from an address that has not said anything."""
    return socket.create_connection((LOOPBACK, gateway.config.port), timeout=START_S, source_address=(source, 0))


def answer(gateway: Running, source: str = LOOPBACK) -> bytes:
    """What a request over a new connection gets."""
    plain = connected(gateway, source)
    with gateway.trusting().wrap_socket(plain, server_hostname=LOOPBACK) as secure:
        secure.sendall(ASKED)
        return read_to_end(secure)


def is_closed(connection: socket.socket) -> bool:
    """Wait until the gateway closes a connection, and fail where it does not."""
    return read_to_end(connection) == b""


def is_open(connection: socket.socket) -> bool:
    """Whether the gateway has not closed a connection, nor said anything."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except ConnectionError:
        pass
    return False


@has_other
def test_silent_connections_over_the_limit_are_closed_at_once_and_another_address_gets_in(gateway: Running) -> None:
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(connected(gateway)) for _ in range(PER_PEER)]
        for _ in range(30):
            with connected(gateway) as over:
                assert is_closed(over)
        assert all(map(is_open, silent))
        assert b" 200 " in answer(gateway, OTHER)


@has_other
def test_silent_connections_count_for_all_addresses_together(gateway: Running) -> None:
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(connected(gateway)) for _ in range(PER_PEER)]
        silent += [held.enter_context(connected(gateway, OTHER)) for _ in range(IN_ALL - PER_PEER)]
        with connected(gateway, OTHER) as over:
            assert is_closed(over)
        assert all(map(is_open, silent))


def test_connections_that_have_shaken_hands_count_on(gateway: Running) -> None:
    with contextlib.ExitStack() as held:
        greeted = [held.enter_context(gateway.connection()) for _ in range(PER_PEER)]
        with connected(gateway) as over:
            assert is_closed(over)
        assert all(map(is_open, greeted))


def test_every_connection_up_to_the_limit_is_served() -> None:
    with running(connections_per_peer=2, connections=2) as made, made.connection():
        assert b" 200 " in answer(made)


def test_closed_connections_no_longer_count_however_they_ended(gateway: Running) -> None:
    for _ in range(2 * IN_ALL):
        with connected(gateway):
            pass  # closed by the peer, which said nothing
        with connected(gateway) as plaintext:
            plaintext.sendall(ASKED)
            assert b"HTTP" not in read_to_end(plaintext)  # closed by the gateway, in the handshake
        with gateway.connection():
            pass  # closed by the peer, after it
        assert b" 200 " in answer(gateway)


def test_silent_connection_is_closed_when_the_handshake_took_too_long() -> None:
    with running(connections_per_peer=1, handshake_timeout_s=0.3, header_timeout_s=NEVER_S) as made:
        for _ in range(2):
            with connected(made) as silent:
                assert is_closed(silent)
        assert b" 200 " in answer(made)


@pytest.fixture
def open_files() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_files_for_all_connections_may_be_open(open_files: tuple[int, int]) -> None:
    hard = open_files[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (BACKLOG, hard))
    allow_open_files(8)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (16 + BACKLOG + SPARE_FILES, hard)
    allow_open_files(2)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (16 + BACKLOG + SPARE_FILES, hard)


def test_system_that_allows_too_few_files_is_named(
    open_files: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    hard = open_files[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("this system has no hard limit")
    resource.setrlimit(resource.RLIMIT_NOFILE, (BACKLOG, hard))
    with caplog.at_level(logging.WARNING):
        allow_open_files(hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert "open files" in caplog.text
