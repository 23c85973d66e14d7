"""The check of the way to the coordinator, against real TLS servers that are wrong in one thing each."""

from __future__ import annotations

import email.utils
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.checks.finding import Finding
from client.checks.gateway import check_connection
from client.places import Places
from tests.federation_keys import authority, server_files, unsigned_kit

Serve = Callable[..., int]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers that answer every connection once."""
    started: list[tuple[socket.socket, threading.Thread]] = []

    def start(which: str = "authority", host: str = "127.0.0.1", ahead_s: float = 0.0, tls: bool = True) -> int:
        certificate, key = server_files(which, host)
        (tmp_path / "server.pem").write_bytes(certificate + key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "server.pem")
        listening = socket.create_server(("127.0.0.1", 0))
        date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)

        def answer() -> None:
            try:
                plain, _ = listening.accept()
                with plain, context.wrap_socket(plain, server_side=True) if tls else plain as one:
                    one.recv(4096)
                    one.sendall(f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\n\r\n".encode())
            except OSError:
                return

        thread = threading.Thread(target=answer)
        thread.start()
        started.append((listening, thread))
        port: int = listening.getsockname()[1]
        return port

    yield start
    for listening, thread in started:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def check(folder: Path, port: int, host: str = "127.0.0.1") -> Finding:
    places = Places.beside(folder / "site.yaml")
    unsigned_kit(address=f"{host}:{port}").write(places.kit)
    return check_connection(places)


def test_gateway_that_the_kit_names_passes(tmp_path: Path, serve: Serve) -> None:
    found = check(tmp_path, serve())
    assert (found.outcome, found.remedy) == ("pass", "")
    assert "clocks" in found.found


def test_certificate_of_another_authority_fails(tmp_path: Path, serve: Serve) -> None:
    assert authority("other") != authority()
    found = check(tmp_path, serve("other"))
    assert found.outcome == "fail"
    assert "signed by the kit's CA" in found.remedy


def test_certificate_of_another_host_fails(tmp_path: Path, serve: Serve) -> None:
    found = check(tmp_path, serve(host="10.1.2.3"))
    assert found.outcome == "fail"
    assert "mismatch" in found.found


def test_plaintext_fails(tmp_path: Path, serve: Serve) -> None:
    found = check(tmp_path, serve(tls=False))
    assert (found.outcome, "no TLS" in found.found) == ("fail", True)


def test_port_that_nobody_listens_on_fails(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = check(tmp_path, taken.getsockname()[1])
    assert found.outcome == "fail"
    assert "refused" in found.found


@pytest.mark.parametrize(("ahead_s", "outcome", "said"), [(-60, "fail", "ahead of"), (600, "fail", "behind"),
                                                          (60, "pass", "clocks")])  # fmt: skip
def test_clocks_are_compared_as_flower_does(
    tmp_path: Path, serve: Serve, ahead_s: float, outcome: str, said: str
) -> None:
    found = check(tmp_path, serve(ahead_s=ahead_s))
    assert (found.outcome, said in found.found) == (outcome, True)
