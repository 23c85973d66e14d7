"""The agent's socket: who may connect, what is turned away, and that bytes come back as the site answered them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from grpc_health.v1 import health_pb2, health_pb2_grpc

import client.app
from client.agent.channel import ASK, SERVICE, ask, status_of
from client.agent.frames import cut
from client.agent.server import WAITING, AgentServer
from common.errors import ConfigError, RunError
from common.flower_records import from_records, to_records
from common.wire import Refusal, SiteDescription, parse_header

SILENT_S = 0.3


class Echo:
    """Stands where a site would, so that the socket is tested without one: says what it was asked, waits if told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, bytes]] = []
        self.going = threading.Event()
        self.going.set()

    def answer(self, kind: str, config: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        self.seen.append((kind, config, header))
        assert self.going.wait(20)
        return header, payload

    def status(self) -> dict[str, Any]:
        return {"messages": len(self.seen)}


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def place(tmp_path: Path, echo: Echo) -> Iterator[Path]:
    path = tmp_path / "run" / "agent.sock"
    server = AgentServer(echo, path, receive_s=SILENT_S)
    server.start()
    yield path
    echo.going.set()
    server.stop(0)


def raw(place: Path) -> Any:
    return grpc.insecure_channel(f"unix:{place}")


def test_bytes_come_back_as_they_were_answered(place: Path, echo: Echo) -> None:
    payload = os.urandom(3_000_001)
    assert ask(place, "train", (b"name: x", b'{"kind":"train"}', payload)) == (b'{"kind":"train"}', payload)
    assert ask(place, "query", (b"", b"", b"")) == (b"", b"")
    assert echo.seen == [("train", b"name: x", b'{"kind":"train"}'), ("query", b"", b"")]
    assert status_of(place) == {"messages": 2}


def test_socket_is_for_owner_and_group_alone(place: Path) -> None:
    assert stat.S_IMODE(place.stat().st_mode) == 0o660
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o2750


def test_agent_answers_health_checks(place: Path) -> None:
    with raw(place) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
    assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_second_agent_does_not_take_the_socket_away(place: Path, echo: Echo) -> None:
    with pytest.raises(RunError, match="another agent listens"):
        AgentServer(echo, place).start()
    assert ask(place, "query", (b"", b"x", b"")) == (b"x", b"")


def test_agent_starts_where_a_killed_one_left_its_socket(tmp_path: Path, echo: Echo) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "agent.sock"))
    left.close()
    tmp_path.chmod(0o750)
    server = AgentServer(echo, tmp_path / "agent.sock")
    server.start()
    assert ask(tmp_path / "agent.sock", "query", (b"", b"x", b"")) == (b"x", b"")
    server.stop(0)


def test_folder_that_is_open_to_everybody_is_refused(tmp_path: Path, echo: Echo) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(RunError, match="open to everybody"):
        AgentServer(echo, tmp_path / "run" / "agent.sock").start()


def test_path_that_no_socket_can_have_is_refused(tmp_path: Path, echo: Echo) -> None:
    with pytest.raises(ConfigError, match="expected at most 100"):
        AgentServer(echo, tmp_path / ("x" * 100) / "agent.sock").start()


@pytest.mark.parametrize("frames", [[], [b"{}"], [b"x" * 5000], [*cut("train", (b"", b"x" * 70000, b""))]])
def test_bytes_that_are_no_message_reach_no_site(place: Path, echo: Echo, frames: list[bytes]) -> None:
    with raw(place) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(ASK)(iter(frames), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert echo.seen == []
    assert ask(place, "query", (b"", b"x", b"")) == (b"x", b"")


def test_piece_that_is_too_large_is_not_taken(place: Path, echo: Echo) -> None:
    opening = next(cut("train", (b"", b"", bytes(3 << 20))))
    with raw(place) as channel, pytest.raises(grpc.RpcError):
        list(channel.stream_stream(ASK)(iter([opening, bytes(3 << 20)]), timeout=10))
    assert echo.seen == []


def test_message_that_never_ends_gives_up_its_turn(place: Path, echo: Echo) -> None:
    silence = threading.Event()

    def slow() -> Iterator[bytes]:
        yield next(cut("train", (b"", b"", b"abc")))
        silence.wait(20)

    with raw(place) as channel:
        call = channel.stream_stream(ASK)(slow())
        with pytest.raises(grpc.RpcError):
            list(call)
        assert ask(place, "query", (b"", b"x", b"")) == (b"x", b"")
        silence.set()
    assert [kind for kind, _, _ in echo.seen] == ["query"]


def test_messages_are_worked_on_one_by_one_and_too_many_are_turned_away(place: Path, echo: Echo) -> None:
    echo.going.clear()
    with raw(place) as channel:
        calls = [channel.stream_stream(ASK)(cut("train", (b"", b"%d" % n, b""))) for n in range(2 + WAITING)]
        deadline = time.monotonic() + 20
        while not any(call.done() for call in calls) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(echo.seen) == 1
        turned_away = [call for call in calls if call.done()]
        assert [call.code() for call in turned_away] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        echo.going.set()
        answers = [list(call) for call in calls if call not in turned_away]
    assert len(answers) == 1 + WAITING == len(echo.seen)


def test_agent_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no agent at .* Start it"):
        ask(tmp_path / "agent.sock", "query", (b"", b"", b""), wait_s=0.1)
    with pytest.raises(RunError, match="no agent at"):
        status_of(tmp_path / "agent.sock", wait_s=0.1)


def through_the_client_app(node: dict[str, Any], run: dict[str, Any]) -> tuple[bytes, bytes]:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    message = Message(to_records(b"header", b"payload"), 1, "train", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    return from_records(client.app.app(message, context).content)


def test_client_app_forwards_header_payload_and_run_config(place: Path, echo: Echo) -> None:
    node = {"agent-socket": str(place), "partition-id": 0, "num-partitions": 1}
    assert through_the_client_app(node, {"config-yaml": "name: x"}) == (b"header", b"payload")
    assert echo.seen == [("train", b"name: x", b"header")]
    through_the_client_app(node, {"config-file": "/etc/passwd"})
    assert echo.seen[1] == ("train", b"", b"header")


@pytest.mark.parametrize(
    "node",
    [{}, {"agent-socket": ""}, {"agent-socket": 7, "partition-id": 0, "num-partitions": 1}, {"site-config": "x"},
     {"partition-id": 0}, {"agent-socket": "", "partition-id": 0, "num-partitions": 1}],
)  # fmt: skip
def test_node_without_an_agent_is_refused_and_never_taken_for_a_simulated_one(node: dict[str, Any]) -> None:
    header, payload = through_the_client_app(node, {"config-yaml": "name: x"})
    assert parse_header(header, SiteDescription) == Refusal(code="no_agent", place="")
    assert payload == b""


def test_client_app_loads_neither_torch_nor_what_reads_data() -> None:
    code = "import sys, client.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.split(".")[0] in {"client", "common", "server", "simulations"}}
    assert not {"torch", "transformers", "peft", "opacus", "safetensors", "pydantic"} & set(loaded)
    assert ours == {
        "client", "client.app", "client.agent", "client.agent.channel", "client.agent.frames",
        "common", "common.errors", "common.flower_keys", "common.flower_records",
    }  # fmt: skip
