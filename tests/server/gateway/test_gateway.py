"""What the gateway lets through, over real TLS connections: the fleet API, streamed, and nothing else."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.supercore.retry.http_retry import _RETRYABLE_STATUS_CODES

from server.authority import issue, key_bytes, load_authority, new_authority, new_key
from server.gateway.forward import TRY_AGAIN
from server.gateway.serve import gateway_server
from server.state_folder import StateFolder, write_private
from tests.server.coordinator import LOOPBACK, coordinator
from tests.server.gateway.running import START_S, Running, drip, overflow, read_to_end, running, serving

HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running(body_bytes=2**20, header_timeout_s=1.0, idle_timeout_s=1.0) as made:
        yield made


def test_fleet_request_arrives_whole_and_its_answer_comes_back(gateway: Running) -> None:
    body = bytes(range(256)) * 4000
    with gateway.client() as client:
        answer = client.post("/v1/fleet/push-object", content=body, headers={"flower-key": "abc", "te": "trailers"})
    assert answer.status_code == 200
    assert answer.text == hashlib.sha256(body).hexdigest()
    assert answer.headers["x-upstream"] == "yes"
    path, headers = gateway.upstream.asked[-1]
    assert path == "/v1/fleet/push-object"
    assert headers["flower-key"] == "abc"
    assert "te" not in headers


def test_body_of_unknown_length_arrives_whole(gateway: Running) -> None:
    pieces = [b"a" * 1000, b"b" * 70_000, b"c"]
    with gateway.client() as client:
        answer = client.post("/v1/fleet/push-messages", content=iter(pieces))
    assert answer.text == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_request_streams_up_before_it_is_whole(gateway: Running) -> None:
    gateway.upstream.first_piece.clear()
    with gateway.connection() as secure:
        secure.sendall(HEAD + b"content-length: 10\r\nconnection: close\r\n\r\nhello")
        assert gateway.upstream.first_piece.wait(START_S)
        secure.sendall(b"world")
        assert hashlib.sha256(b"helloworld").hexdigest().encode() in read_to_end(secure)


def test_answer_streams_down_before_it_is_whole(gateway: Running) -> None:
    gateway.upstream.answer = b"x" * 100_000
    gateway.upstream.go_on.clear()
    try:
        with gateway.client() as client, client.stream("POST", "/v1/fleet/pull-object") as answer:
            pieces = answer.iter_raw()
            got = len(next(pieces))
            assert 0 < got <= 50_000
            gateway.upstream.go_on.set()
            assert got + sum(map(len, pieces)) == 100_000
    finally:
        gateway.upstream.answer = b""


NOT_THE_FLEET = [
    "/", "/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/runtime/pull-task-input",
    "/v1/fleet", "/v1/fleet/", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run", "/v1/fleet/%2e%2e%2fruntime%2facquire-task", "//v1/fleet/get-run",
    "/v1//fleet/get-run", "/v1/fleet//get-run", "/v1/fleet/get-run/", "/v1/fleet/get-run/../../control/start-run",
    "/v1/fleet/./get-run", "/v1/fleet/get-run;/../control", "/v1/fleet/get-run%00", "/v1/fleet/get-run%0d%0aX:y",
    "/V1/fleet/get-run", "/v1/fleet/GET-RUN", "/v1/fleet/get-run?x=/v1/control/start-run", "/v1/fleet/get\\..\\run",
    "/v1/%66leet/get-run", "/health", "/docs", "/openapi.json", "https://127.0.0.1:1/v1/control/start-run",
]  # fmt: skip


@pytest.mark.parametrize("path", NOT_THE_FLEET)
def test_everything_else_is_not_found_and_never_forwarded(gateway: Running, path: str) -> None:
    before = len(gateway.upstream.asked)
    answer = gateway.raw(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"404", b"400"), answer
    assert len(gateway.upstream.asked) == before


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH"])
def test_other_methods_are_not_forwarded(gateway: Running, method: str) -> None:
    before = len(gateway.upstream.asked)
    answer = gateway.raw(f"{method} /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"404", b"400"), answer
    assert len(gateway.upstream.asked) == before


def test_declared_body_over_the_limit_is_refused_before_it_is_sent(gateway: Running) -> None:
    before = len(gateway.upstream.asked)
    assert gateway.raw(HEAD + b"content-length: 1048577\r\n\r\n").split(b" ")[1] == b"413"
    assert len(gateway.upstream.asked) == before


def test_undeclared_body_over_the_limit_is_refused_on_the_way(gateway: Running) -> None:
    with gateway.connection() as secure:
        answer = overflow(secure, HEAD, 40 * 65536)
    assert answer.split(b" ")[1:2] in ([b"413"], [])


def test_body_of_the_limit_is_let_through(gateway: Running) -> None:
    body = b"x" * 2**20
    with gateway.client() as client:
        assert client.post("/v1/fleet/push-object", content=body).text == hashlib.sha256(body).hexdigest()


def test_header_over_the_limit_is_refused(gateway: Running) -> None:
    head = HEAD + b"x: "
    # Not a byte more than it takes, so that nothing is still under way when the gateway closes.
    too_long = head + b"y" * (gateway.config.limits.header_bytes + 1 - len(head))
    assert gateway.raw(too_long).split(b" ")[1] == b"400"


def test_two_lengths_that_disagree_are_refused(gateway: Running) -> None:
    before = len(gateway.upstream.asked)
    answer = gateway.raw(HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!")
    assert answer.split(b" ")[1] == b"400"
    assert len(gateway.upstream.asked) == before


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fl", HEAD], ids=["nothing", "part of a line", "part of a header"])
def test_connection_that_never_ends_its_header_is_closed(gateway: Running, sent: bytes) -> None:
    assert gateway.raw(sent) == b""


def test_header_that_drips_is_closed_all_the_same(gateway: Running) -> None:
    with gateway.connection() as secure:
        assert drip(secure, HEAD) == b""


def test_second_header_on_a_connection_has_its_time_too(gateway: Running) -> None:
    with gateway.connection() as secure:
        secure.sendall(HEAD + b"content-length: 0\r\n\r\n")
        first = secure.recv(65536)
        secure.sendall(HEAD)
        rest = read_to_end(secure)
    assert first.split(b" ")[1] == b"200"
    assert rest.count(b"HTTP/1.1") <= 1


def test_body_that_stops_coming_is_given_up(gateway: Running) -> None:
    answer = gateway.raw(HEAD + b"content-length: 100\r\n\r\nhello")
    assert int(answer.split(b" ")[1]) == TRY_AGAIN


def test_plaintext_is_closed(gateway: Running) -> None:
    with socket.create_connection((LOOPBACK, gateway.config.port), timeout=START_S) as plain:
        plain.sendall(HEAD + b"content-length: 0\r\n\r\n")
        assert b"HTTP" not in read_to_end(plain)


def test_gateway_is_known_by_its_authority_and_name(gateway: Running) -> None:
    other = new_authority("clinics", datetime.now(UTC)).certificate.public_bytes(Encoding.PEM).decode()
    stranger = ssl.create_default_context(cadata=other)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"https://{LOOPBACK}:{gateway.config.port}/v1/fleet/get-run", verify=stranger, trust_env=False)
    with (
        socket.create_connection((LOOPBACK, gateway.config.port), timeout=START_S) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        gateway.trusting().wrap_socket(plain, server_hostname="other.example.org")


def test_upstream_with_another_name_is_not_spoken_to() -> None:
    with running(upstream_of="operator") as made, made.client() as client:
        assert client.post("/v1/fleet/get-run").status_code == 503
        assert not made.upstream.asked


def test_requests_over_the_rate_are_refused_once_the_wait_is_too_long() -> None:
    with running(requests_per_s=0.01, burst=3, queue_timeout_s=1.0) as made, made.client() as client:
        codes = [client.post("/v1/fleet/get-run").status_code for _ in range(4)]
    assert codes == [200, 200, 200, TRY_AGAIN]


def test_what_may_be_tried_again_is_tried_again_by_flowers_client() -> None:
    assert TRY_AGAIN in _RETRYABLE_STATUS_CODES


def with_certificate(state: StateFolder, began: datetime) -> None:
    """Give the gateway a certificate that began at a time."""
    key = new_key()
    leaf = issue(load_authority(state), key.public_key(), (LOOPBACK,), began)
    for path, content in (
        (state.key("gateway"), key_bytes(key)),
        (state.certificate("gateway"), leaf.public_bytes(Encoding.PEM)),
    ):
        path.unlink()
        write_private(path, content)


def test_expired_certificate_is_refused_by_the_site() -> None:
    with coordinator() as state:
        with_certificate(state, datetime.now(UTC) - timedelta(days=398))
        server, loop = gateway_server(state, state.config())
        assert isinstance(server, uvicorn.Server)
        context = ssl.create_default_context(cafile=str(state.ca_certificate))
        with serving(server, loop), pytest.raises(httpx.ConnectError, match="expired"):
            httpx.post(f"https://{LOOPBACK}:{state.config().port}/v1/fleet/get-run", verify=context, trust_env=False)
