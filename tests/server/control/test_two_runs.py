"""Two runs of one coordinator with one TCP port for control: both are served, and neither is taken for the other."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import grpc
import pytest
from typer.testing import CliRunner

from common.control import control_pb2, control_pb2_grpc
from common.errors import ConfigError, RunError
from server.cli import app
from server.control.board import Board
from server.control.client import ControlClient, connected, operator_credentials
from server.control.service import ControlService, mutual_tls, served
from server.control.steered import Settings, Steered
from server.run_place import RunPlace, ask_for_run
from server.state_folder import StateFolder
from tests.server.coordinator import LOOPBACK, coordinator, free_port
from tests.server.run_configs import run_config

WAIT_S = 60.0


@dataclass
class Served:
    """A run whose control service is up."""

    place: RunPlace
    board: Board
    steered: Steered


@contextmanager
def run_of(state: StateFolder, name: str) -> Iterator[Served]:
    """Serve a run's control as a ServerApp does, on the coordinator's port if it has one."""
    config, port = run_config(name=name), state.config().control_port
    place, board = ask_for_run(state, config), Board(name, config.federation.rounds)
    steered = Steered(place.steering, config, board)
    credentials = mutual_tls(state.ca_certificate, state.certificate("control"), state.key("control"))
    service = ControlService(board, steered, (3600.0, 0))
    with place.lease(0, 0.0), served(service, place.socket, None if port is None else (port, credentials)):
        yield Served(place, board, steered)


@contextmanager
def client_of(state: StateFolder, run: Served, *, tcp: bool = False) -> Iterator[ControlClient]:
    with connected(state, run.place, state.config(), tcp=tcp) as client:
        yield client


def test_second_run_is_served_on_its_socket_alone_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with coordinator(control_port=free_port()) as state, run_of(state, "first") as first:
        assert not caplog.records
        with caplog.at_level(logging.WARNING), run_of(state, "second") as second:
            [said] = [record.getMessage() for record in caplog.records if record.name == "server.control.service"]
            assert str(state.config().control_port) in said
            assert "unix socket alone" in said
            for run, tcp in ((first, False), (first, True), (second, False)):
                with client_of(state, run, tcp=tcp) as client:
                    assert client.status()["run"] == run.place.name
            with client_of(state, second) as client:
                client.pause()
            assert (first.steered.settings.paused, second.steered.settings.paused) == (False, True)
        with client_of(state, first, tcp=True) as client:  # the second's end took nothing from it
            assert client.status()["run"] == "first"


def test_tcp_call_for_another_run_is_refused_and_changes_neither() -> None:
    with (
        coordinator(control_port=free_port()) as state,
        run_of(state, "first") as first,
        run_of(state, "second") as second,
        client_of(state, second, tcp=True) as client,
    ):
        calls = (
            client.status, client.pause, client.resume, lambda: client.stop(after_round=True),
            lambda: client.stop(after_round=False), lambda: client.set("round_timeout_s", "60"),
            lambda: list(client.watch()),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(ConfigError, match="run 'first' answers here, not 'second'; expected") as refused:
                call()
            assert "\n" not in str(refused.value)
        for run in (first, second):
            assert run.steered.settings == Settings()
            run.steered.expect_running()


@pytest.mark.parametrize("command", ["status second", "watch second", "pause second", "set second round_timeout_s=60"])
def test_commands_say_in_one_line_that_tcp_reaches_another_run(command: str) -> None:
    with coordinator(control_port=free_port()) as state, run_of(state, "first"), run_of(state, "second"):
        done = CliRunner().invoke(app, [*command.split(), "--tcp", "--state", str(state.path)])
        assert done.exit_code != 0
        [line] = done.output.strip().splitlines()
        assert "run 'first' answers here, not 'second'" in line
        assert "Leave out --tcp" in line


def test_port_goes_to_the_next_run_that_begins_after_the_first_has_ended() -> None:
    with coordinator(control_port=free_port()) as state:
        with run_of(state, "first"):
            pass
        with run_of(state, "second") as second, client_of(state, second, tcp=True) as client:
            assert client.status()["run"] == "second"


def test_run_without_the_port_says_so_to_tcp_once_nobody_has_it() -> None:
    with coordinator(control_port=free_port()) as state, ExitStack() as first:
        first.enter_context(run_of(state, "first"))
        with run_of(state, "second") as second:
            first.close()
            with client_of(state, second, tcp=True) as client, pytest.raises(RunError, match="leave out --tcp"):
                client.status()
            with client_of(state, second) as client:
                assert client.status()["run"] == "second"


def test_name_of_the_run_is_no_credential_and_may_be_left_out_by_who_has_one() -> None:
    with coordinator(control_port=free_port()) as state, run_of(state, "first"), run_of(state, "second"):
        address = f"{LOOPBACK}:{state.config().control_port}"
        uncertified = grpc.ssl_channel_credentials(state.ca_certificate.read_bytes())
        for channel in (grpc.insecure_channel(address), grpc.secure_channel(address, uncertified)):
            with channel, pytest.raises(RunError, match="does not answer"):
                ControlClient(channel, "first").status()
        with grpc.secure_channel(address, operator_credentials(state)) as channel:
            view = control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=WAIT_S)
            assert view.run == "first"


def test_port_that_somebody_else_has_costs_no_run() -> None:
    with socket.socket() as other, coordinator(control_port=free_port()) as state:
        other.bind((LOOPBACK, state.config().control_port))
        other.listen()
        with run_of(state, "first") as first, client_of(state, first) as client:
            assert client.status()["run"] == "first"


def test_free_port_without_sound_certificates_is_an_error() -> None:
    with coordinator(control_port=free_port()) as state:
        state.certificate("control").write_text("no certificate")
        with pytest.raises(RunError, match="cannot listen on port"), run_of(state, "first"):
            pytest.fail("served with nothing to show")
