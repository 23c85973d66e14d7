"""The control service over real gRPC: what an operator sees, may change, and who may not."""

from __future__ import annotations

import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from server.authority import issue, key_bytes, new_authority, new_key
from server.control.board import Board
from server.control.client import ControlClient, connected, operator_credentials
from server.control.service import SERVICE, ControlService, mutual_tls, served
from server.control.steered import Settings, Steered, StoppedError
from server.outcome import Outcome
from server.run_place import RunPlace, ask_for_run
from server.state_folder import StateFolder
from tests.other_users import as_user, expect_users, switches_users
from tests.server.coordinator import LOOPBACK, coordinator, free_port
from tests.server.run_configs import run_config

WAIT_S = 60.0


class Grid:
    """Counts the calls that keep a paused ServerApp in touch with Flower."""

    def __init__(self) -> None:
        self.called = threading.Event()

    def get_node_ids(self) -> list[int]:
        self.called.set()
        return []


@dataclass
class Service:
    """A control service, and what it is about."""

    state: StateFolder
    place: RunPlace
    config: RunConfig
    board: Board
    steered: Steered

    @contextmanager
    def client(self, **options: Any) -> Iterator[ControlClient]:
        with connected(self.state, self.place, self.state.config(), **options) as client:
            yield client


@contextmanager
def service(tcp: bool = False, **sections: Any) -> Iterator[Service]:
    port = free_port() if tcp else None
    with coordinator(control_port=port) as state:
        config = run_config(**sections)
        place = ask_for_run(state, config)
        board = Board("tiny", config.federation.rounds)
        steered = Steered(place.steering, config, board)
        credentials = mutual_tls(state.ca_certificate, state.certificate("control"), state.key("control"))
        listening = None if port is None else (port, credentials)
        with (
            place.lease(0, 0.0),
            served(ControlService(board, steered, (3600.0, 0)), place.socket, listening),
        ):
            yield Service(state, place, config, board, steered)


OUTCOME = Outcome("admitted", bytes_up=100, bytes_down=90, steps=3)


def play_round(board: Board, config: RunConfig) -> None:
    """Tell a board what a round loop tells it: one site answers, one is rejected, one is late."""
    board.run_started(config, ["a", "b", "c", "d"], 0)
    board.round_started(1, ["a", "b", "c"])
    board.site_answered(1, "a", OUTCOME)
    board.site_answered(1, "b", Outcome("rejected", reason="non_finite: NaN", bytes_up=7, bytes_down=90))


def test_view_tells_who_answered_who_has_not_and_why_one_was_rejected() -> None:
    with service() as made, made.client() as client:
        assert client.status()["phase"] == "joining"
        play_round(made.board, made.config)
        view = client.status()
        assert (view["phase"], view["round"], view["rounds"], view["completed_rounds"]) == ("training", 1, 3, 0)
        assert {site["site"]: site["status"] for site in view["sites"]} == {
            "a": "admitted", "b": "rejected", "c": "asked", "d": "idle",
        }  # fmt: skip
        assert view["sites"][1]["reason"] == "non_finite: NaN"
        assert view["sites"][0]["answered_after_s"] >= 0
        assert view["sites"][2]["answered_after_s"] is None
        assert (view["bytes_up"], view["bytes_down"]) == (107, 180)
        late = {"status": "late", "reason": "no reply within federation.round_timeout_s", "bytes_down": 90}
        record = {"round": 1, "sites": {"c": late}}
        made.board.evaluated({"metrics": {"overall": {"loss": 0.5}}})
        made.board.round_ended(record, 1.25)
        view = client.status()
        assert (view["completed_rounds"], view["epsilon"], view["metrics"]) == (1, 1.25, {"loss": 0.5})
        assert view["sites"][2]["status"] == "late"
        assert view["bytes_down"] == 270
        assert view["round_elapsed_s"] is None


def test_view_counts_sites_that_came_in_while_the_round_was_on() -> None:
    board = Board("tiny", 3)
    play_round(board, run_config())
    board.sites_asked(1, ["e"])
    assert board.read()[1].sites["e"].status == "asked"
    spare = {"status": "spare", "reason": "", "bytes_down": 90}
    board.round_ended({"round": 1, "sites": {"c": spare, "e": spare, "unheard of": spare}}, None)
    standing = board.read()[1]
    assert {standing.sites[site].status for site in ("c", "e", "unheard of")} == {"spare"}
    assert standing.bytes_down == 180 + 3 * 90


def test_watch_ends_with_an_explicit_last_view() -> None:
    with service() as made, made.client() as client:
        views = client.watch()
        assert next(views)["phase"] == "joining"
        play_round(made.board, made.config)
        made.board.ended("completed")
        last = list(views)[-1]
        assert (last["phase"], last["ended"]) == ("ended", "completed")


def test_watcher_gets_the_last_view_though_the_service_ends_at_once() -> None:
    seen: list[dict[str, Any]] = []
    with service() as made:
        ready = threading.Event()

        def watch() -> None:
            with made.client() as client:
                for view in client.watch():
                    seen.append(view)
                    ready.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert ready.wait(WAIT_S)
        made.board.ended("failed", "no sites")
    watcher.join(WAIT_S)
    assert (seen[-1]["ended"], seen[-1]["reason"]) == ("failed", "no sites")


def test_pause_holds_the_next_round_while_the_grid_is_called_and_resume_lets_it_go() -> None:
    with service() as made, made.client() as client:
        assert made.steered.proceed(1, Grid())  # type: ignore[arg-type]
        client.pause()
        grid, went_on = Grid(), threading.Event()

        def loop() -> None:
            if made.steered.proceed(2, grid):  # type: ignore[arg-type]
                went_on.set()

        thread = threading.Thread(target=loop)
        thread.start()
        assert grid.called.wait(WAIT_S)
        assert client.status()["phase"] == "paused"
        assert not went_on.is_set()
        client.resume()
        assert went_on.wait(WAIT_S)
        thread.join(WAIT_S)
        assert not client.status()["paused"]


def test_stop_after_round_ends_the_loop_even_where_it_is_paused() -> None:
    with service() as made, made.client() as client:
        client.pause()
        client.stop(after_round=True)
        assert not made.steered.proceed(2, Grid())  # type: ignore[arg-type]


def test_stop_at_once_raises_from_the_next_call() -> None:
    with service() as made, made.client() as client:
        client.stop(after_round=False)
        with pytest.raises(StoppedError):
            made.steered.expect_running()
        with pytest.raises(StoppedError):
            made.steered.proceed(2, Grid())  # type: ignore[arg-type]


def test_settings_hold_from_the_next_round_and_survive_the_serverapp() -> None:
    with service(federation={"min_sites": 2}) as made, made.client() as client:
        assert made.steered.sites_per_round(None) is None
        client.set("sites_per_round", "3")
        client.set("round_timeout_s", "60")
        assert made.steered.sites_per_round(None) == 3
        assert made.steered.round_timeout_s(3600.0) == 60.0
        view = client.status()
        assert (view["sites_per_round"], view["round_timeout_s"]) == (3, 60.0)
        again = Steered(made.place.steering, made.config, Board("tiny"))
        assert again.settings == made.steered.settings
        client.set("sites_per_round", "all")
        assert made.steered.sites_per_round(5) == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.lr", "1"), ("privacy", "{unit: none}"), ("min_sites", "1"), ("sites_per_round", "1"),
        ("sites_per_round", "0"), ("sites_per_round", "many"), ("sites_per_round", "2.5"), ("sites_per_round", "true"),
        ("round_timeout_s", "0"), ("round_timeout_s", "-1"), ("round_timeout_s", ".inf"), ("round_timeout_s", ".nan"),
        ("paused", "true"), ("", ""),
    ],
)  # fmt: skip
def test_what_may_not_change_is_refused_and_changes_nothing(key: str, value: str) -> None:
    with service(federation={"min_sites": 2}) as made, made.client() as client:
        with pytest.raises(ConfigError, match="expected"):
            client.set(key, value)
        assert made.steered.settings == Settings()


def test_cohort_size_of_site_level_privacy_is_part_of_its_mechanism() -> None:
    private = {"unit": "site", "epsilon": 8.0}
    rounds = {"sites_per_round": 2}
    with (
        service(privacy=private, federation=rounds) as made,
        made.client() as client,
        pytest.raises(ConfigError, match="mechanism"),
    ):
        client.set("sites_per_round", "3")


def test_socket_is_the_owners_alone_and_goes_with_the_service() -> None:
    with service() as made:
        assert stat.S_IMODE(made.place.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(made.state.path.stat().st_mode) == 0o700
        path = made.place.socket
    assert not path.exists()


CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
IS_DENIED = f"""
try:
    {CONNECT}
except PermissionError:
    sys.exit(0)
sys.exit(1)
"""


@switches_users
def test_another_local_user_reaches_the_socket_neither_through_its_folder_nor_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_users("nobody")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")  # noqa: S108 - which everybody may pass through
    with service() as made:
        path, folder = made.place.socket, made.state.path
        folder.parent.chmod(0o755)
        assert as_user("nobody", IS_DENIED, path)
        for passable in (folder, path.parent):
            passable.chmod(0o755)
        assert as_user("nobody", IS_DENIED, path)
        path.chmod(0o666)
        assert as_user("nobody", CONNECT, path)
        with made.client() as client:
            assert client.status()["run"] == "tiny"


def test_health_and_reflection_answer() -> None:
    with service() as made, grpc.insecure_channel(f"unix:{made.place.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_nobody_at_work_is_said_plainly() -> None:
    with coordinator() as state:
        place = ask_for_run(state, run_config())
        with pytest.raises(RunError, match="no ServerApp works"), connected(state, place, state.config()):
            pytest.fail("connected to nobody")


def test_tcp_takes_the_operators_certificate_alone() -> None:
    with service(tcp=True) as made:
        with made.client(tcp=True) as client:
            assert client.status()["run"] == "tiny"
        port, authority = made.state.config().control_port, made.state.ca_certificate.read_bytes()
        stranger, key = new_authority("clinics", datetime.now(UTC)), new_key()
        forged = issue(stranger, key.public_key(), ("operator",), datetime.now(UTC), client=True)
        refused = {
            "no certificate": grpc.ssl_channel_credentials(authority),
            "another authority's": grpc.ssl_channel_credentials(
                authority, key_bytes(key), forged.public_bytes(Encoding.PEM)
            ),
            "a server's": grpc.ssl_channel_credentials(
                authority, made.state.key("gateway").read_bytes(), made.state.certificate("gateway").read_bytes()
            ),
        }
        for what, credentials in refused.items():
            with (
                grpc.secure_channel(f"{LOOPBACK}:{port}", credentials) as channel,
                pytest.raises(RunError, match="does not answer"),
            ):
                ControlClient(channel, what).status()
        with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel, pytest.raises(RunError):
            ControlClient(channel, "plaintext").status()


def test_operator_takes_nobody_else_for_the_coordinator() -> None:
    with service(tcp=True) as made, coordinator() as other:
        credentials = operator_credentials(other)
        with (
            grpc.secure_channel(f"{LOOPBACK}:{made.state.config().control_port}", credentials) as channel,
            pytest.raises(RunError, match="does not answer"),
        ):
            ControlClient(channel, "tiny").status()


def test_damaged_settings_are_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "steering.json").write_text("{}x")
    with pytest.raises(RunError, match="damaged"):
        Steered(tmp_path / "steering.json", run_config(), Board("tiny"))
