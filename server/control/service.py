"""The control service: gRPC, with health checking and reflection, inside the running ServerApp."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.control import control_pb2, control_pb2_grpc
from common.errors import ConfigError, RunError
from server.control.addressee import misaddressed
from server.control.board import Board, Standing
from server.control.steered import Steered

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
WATCHERS = 16
"""Calls at a time; each who watches holds one."""
TICK_S = 1.0
"""Longest between two views that a watcher gets while nothing changes, so that it sees a lost ServerApp."""
LEAST_S = 0.1
"""Least between two views."""
GRACE_S = 2.0
LOOPBACK = "127.0.0.1"

logger = logging.getLogger(__name__)


class ControlService(control_pb2_grpc.ControlServicer):  # type: ignore[misc]
    """Answers operators.

    Args:
        board: where the run stands.
        steered: what an operator may change.
        configured: round timeout and sites per round (0: all) of the run config.
    """

    def __init__(self, board: Board, steered: Steered, configured: tuple[float, int]) -> None:
        self._board, self._steered = board, steered
        self._timeout_s, self._sites_per_round = configured

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._board.read()[1].run

    def Status(self, request: control_pb2.StatusRequest, context: grpc.ServicerContext) -> control_pb2.RunView:  # noqa: N802, D102
        return self._view(self._board.read()[1])

    def Watch(  # noqa: N802, D102
        self, request: control_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.RunView]:
        seen, standing = self._board.read()
        while context.is_active():
            yield self._view(standing)
            if standing.ended:
                return
            time.sleep(LEAST_S)  # what changes meanwhile is one view
            seen, standing = self._board.wait(seen, TICK_S)

    def Pause(self, request: control_pb2.PauseRequest, context: grpc.ServicerContext) -> control_pb2.RunView:  # noqa: N802, D102
        self._steered.pause()
        return self._view(self._board.read()[1])

    def Resume(self, request: control_pb2.ResumeRequest, context: grpc.ServicerContext) -> control_pb2.RunView:  # noqa: N802, D102
        self._steered.resume()
        return self._view(self._board.read()[1])

    def Stop(self, request: control_pb2.StopRequest, context: grpc.ServicerContext) -> control_pb2.RunView:  # noqa: N802, D102
        self._steered.stop(after_round=request.after_round)
        return self._view(self._board.read()[1])

    def Set(self, request: control_pb2.SetRequest, context: grpc.ServicerContext) -> control_pb2.RunView:  # noqa: N802, D102
        try:
            self._steered.set(request.key, request.value)
        except ConfigError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return self._view(self._board.read()[1])

    def _view(self, standing: Standing) -> control_pb2.RunView:
        settings = self._steered.settings
        sites = [
            control_pb2.SiteView(
                site=name, status=site.status, reason=site.reason, bytes_up=site.bytes_up, bytes_down=site.bytes_down,
                answered_after_s=site.answered_after_s,
            )
            for name, site in sorted(standing.sites.items())
        ]  # fmt: skip
        return control_pb2.RunView(
            run=standing.run, phase=standing.phase, round=standing.round, rounds=standing.rounds,
            completed_rounds=standing.completed_rounds, sites=sites,
            round_elapsed_s=self._board.elapsed_s(standing),
            round_timeout_s=settings.round_timeout_s or self._timeout_s,
            sites_per_round=settings.sites_per_round or self._sites_per_round,
            epsilon=standing.epsilon, bytes_up=standing.bytes_up, bytes_down=standing.bytes_down,
            metrics=standing.metrics, paused=settings.paused, stops_after_round=settings.stops_after_round,
            ended=standing.ended, reason=standing.reason,
        )  # fmt: skip


class _ForThisRun(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls that are for another run, before anything is done for them."""

    def __init__(self, run: str) -> None:
        self._run = run

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Pass on, or refuse."""
        reason = misaddressed(self._run, handler_call_details.invocation_metadata)
        if reason is None:
            return continuation(handler_call_details)

        def refuse(request: bytes, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)

        return grpc.unary_unary_rpc_method_handler(refuse)


def _server(service: ControlService) -> tuple[grpc.Server, health.HealthServicer]:
    server = grpc.server(
        futures.ThreadPoolExecutor(WATCHERS), options=[("grpc.so_reuseport", 0)],
        interceptors=(_ForThisRun(service.run),),
    )  # fmt: skip
    control_pb2_grpc.add_ControlServicer_to_server(service, server)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    for name in (SERVICE, ""):
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, healthy


@contextlib.contextmanager
def served(
    service: ControlService, path: Path, tcp: tuple[int, grpc.ServerCredentials] | None = None
) -> Iterator[None]:
    """Serve on a unix socket that its owner alone may open, and on TCP where asked, until the context ends.

    Where another run has the TCP port, the unix socket is all, and the log says so: no run waits for another's end.

    Those who watch get what was set last: say how the run ended before the context ends.

    Args:
        service: what answers.
        path: of the socket; what stands there is replaced.
        tcp: port on the loopback address, and credentials that ask the other side for a certificate.

    Raises:
        RunError: if it cannot listen.
    """
    path.unlink(missing_ok=True)
    server, healthy = _server(service)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise RunError(f"the control service cannot listen on {path}; expected it to be free.") from None
    path.chmod(0o600)
    if tcp is not None:
        _listen_on_tcp(server, *tcp)
    server.start()
    try:
        yield
    finally:
        healthy.enter_graceful_shutdown()
        server.stop(GRACE_S).wait()
        path.unlink(missing_ok=True)


def _listen_on_tcp(server: grpc.Server, port: int, credentials: grpc.ServerCredentials) -> None:
    try:
        server.add_secure_port(f"{LOOPBACK}:{port}", credentials)
    except RuntimeError:
        if not _is_taken(port):
            raise RunError(
                f"the control service cannot listen on port {port}; expected one that its user may open, and sound "
                "certificates. Correct control_port in server.yaml, or run fedtune-server renew."
            ) from None
        logger.warning(
            "control_port %d is taken, as by a run that began before: this one answers on its unix socket alone.", port
        )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC binds: a closed connection is no hold
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def mutual_tls(authority: Path, certificate: Path, key: Path) -> grpc.ServerCredentials:
    """Return credentials of a server that takes only clients with a certificate of the authority."""
    pair = (key.read_bytes(), certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=authority.read_bytes(), require_client_auth=True)
