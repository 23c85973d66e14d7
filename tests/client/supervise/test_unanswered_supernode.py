"""A real SuperNode at a port that is closed, is opened, and is closed again: what is told of its connection."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from client.keys import make_key
from client.places import Places
from client.supervise.components import Component, environment, free_port, supernode_command, write_files
from client.supervise.connection import Connection, connection_of
from client.supervise.supervisor import Supervisor
from tests.federation_keys import server_files, unsigned_kit

LOOPBACK = "127.0.0.1"
PATIENCE_S = 240.0
ANSWERS = {
    "/v1/fleet/activate-node": ActivateNodeResponse(node_id=7).SerializeToString(),
    "/v1/fleet/send-node-heartbeat": SendNodeHeartbeatResponse(success=True).SerializeToString(),
}


class Fleet(BaseHTTPRequestHandler):
    """Answers as a SuperLink that has no message."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = ANSWERS.get(self.path, b"")
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def coordinator(port: int, folder: Path) -> Iterator[None]:
    """A gateway at a port, for as long as the context lasts."""
    (folder / "server.pem").write_bytes(b"".join(server_files()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with ThreadingHTTPServer((LOOPBACK, port), Fleet) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def supervised(component: Component, note: Path) -> Iterator[Supervisor]:
    """A supervisor, in a thread of this process."""
    supervisor, ended = Supervisor([component], note), threading.Event()
    thread = threading.Thread(target=supervisor.run, args=[ended])
    thread.start()
    try:
        yield supervisor
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_supernode_is_connected_from_an_answer_on_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, port = Places.beside(tmp_path / "site.yaml"), free_port()
    kit = unsigned_kit(address=f"{LOOPBACK}:{port}")
    make_key(places)
    write_files(places, kit)
    command = supernode_command(
        kit, places.private_key, places.ca_certificate, places.secret("supernode"), tmp_path / "agent.sock", free_port()
    )
    home = places.own_folder("supernode")
    node = Component("supernode", command, environment("supernode", home), places.log("supernode"), home)

    with supervised(node, places.running) as supervisor:

        def told() -> Connection:
            connection = connection_of(places, supervisor.report())
            assert connection is not None
            return connection

        def tries() -> int:
            return node.log.read_text().count("Connection attempt failed") if node.log.exists() else 0

        until(lambda: tries() > 1)
        monkeypatch.setattr("client.supervise.connection.CONNECTING_S", 0.0)
        assert (told().state, told().said[:13]) == ("not connected", "no answer yet")
        with coordinator(port, tmp_path):
            until(lambda: told().state == "connected")
        before = tries()
        until(lambda: tries() > before)
        monkeypatch.setattr("client.supervise.connection.HEARD_S", 0.0)
        assert (told().state, told().said[:15]) == ("not connected", "no answer since")
        part = supervisor.report()["components"]["supernode"]
        assert (part["starts"], part["refusal"]) == (1, None)  # it lives on and refuses nothing: that is no evidence
