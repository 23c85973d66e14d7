"""The agent's socket: a gRPC service on a Unix socket, with Flower's executor as its only caller.

File permissions say who may connect: the socket is for its owner and group (0660), in a folder that others cannot enter
(2750, so that the socket has the folder's group). One message is worked on at a time; a few wait, whose bytes are not
taken yet; more are turned away.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.agent.channel import MOST_SOCKET_BYTES, OPTIONS, SERVICE
from client.agent.frames import ASKED, cut, join
from client.agent.permissions import FOLDER_MODE, SOCKET_MODE
from common.errors import ConfigError, RunError, WireError

logger = logging.getLogger(__name__)

WAITING = 3
"""Messages that may wait for the one that is worked on."""
RECEIVE_S = 300.0
"""Seconds that a message may take to arrive once it has its turn."""
GRACE_S = 2.0


class Answering(Protocol):
    """What stands behind the socket: a site, see :class:`client.agent.resident.ResidentSite`."""

    def answer(self, kind: str, config_yaml: bytes, header: bytes, payload: bytes, /) -> tuple[bytes, bytes]:
        """Return header and payload of the answer; never raises."""

    def status(self) -> dict[str, Any]:
        """Return what the site's engineer is shown."""


class AgentServer:
    """Serves a site on a socket, from :meth:`start` to :meth:`stop`.

    Args:
        resident: what answers.
        socket: path of the socket.
        receive_s: see ``RECEIVE_S``.
    """

    def __init__(self, resident: Answering, socket: Path, receive_s: float = RECEIVE_S) -> None:
        self._resident, self._socket, self._receive_s = resident, socket, receive_s
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(1 + WAITING)
        self._lock: int | None = None
        self._server = grpc.server(ThreadPoolExecutor(WAITING + 5), options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        self._health = health.HealthServicer()

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: if the path of the socket is too long.
            RunError: if another agent listens there, or the folder is not to be used.
        """
        path = os.fsencode(self._socket)
        if len(path) > MOST_SOCKET_BYTES:
            raise ConfigError(
                f"the agent's socket {self._socket} has a path of {len(path)} bytes; expected at most "
                f"{MOST_SOCKET_BYTES}. Set socket in the site config to a shorter one."
            )
        _make_folder(self._socket.parent)
        self._lock = _lock(self._socket.with_suffix(".lock"))
        handlers = {
            "Ask": grpc.stream_stream_rpc_method_handler(self._ask),
            "Status": grpc.unary_unary_rpc_method_handler(self._status),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        before = os.umask(0o007)
        try:
            self._server.add_insecure_port(f"unix:{self._socket}")
            self._server.start()
        except RuntimeError:
            raise RunError(f"the agent's socket {self._socket} cannot be opened; expected a writable folder.") from None
        finally:
            os.umask(before)
        os.chmod(self._socket, SOCKET_MODE)
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        logger.info("listening at %s", self._socket)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more, and end what is running after ``grace_s`` seconds."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wait(self) -> None:
        """Wait until :meth:`stop`."""
        self._server.wait_for_termination()

    def _ask(self, frames: Iterator[bytes], context: Any) -> Iterable[bytes]:
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        try:
            while not self._turn.acquire(timeout=0.2):
                if not context.is_active():
                    return
            try:
                answered = self._answered(frames, context)
            finally:
                self._turn.release()
            if answered is not None:
                yield from cut("answer", answered)
            else:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no message of fedtune")
        finally:
            self._places.release()

    def _answered(self, frames: Iterator[bytes], context: Any) -> tuple[bytes, bytes] | None:
        """Take a whole message and return the answer to it; None for bytes that are no message."""
        late = threading.Timer(self._receive_s, context.cancel)
        late.daemon = True
        late.start()
        try:
            kind, (config, header, payload) = join(frames, ASKED)
        except WireError as error:
            logger.warning("turned away: %s", error)
            return None
        except grpc.RpcError:
            logger.warning("turned away: a message that did not arrive")
            return None
        finally:
            late.cancel()
        return self._resident.answer(kind, config, header, payload)

    def _status(self, request: bytes, context: Any) -> bytes:
        return json.dumps(self._resident.status()).encode()


def serve(site_config: Path, socket: Path) -> None:
    """Serve a site until the process is asked to end (SIGTERM, SIGINT).

    Raises:
        FedtuneError: if it cannot begin.
    """
    from client.agent.resident import ResidentSite

    serve_resident(ResidentSite(site_config), socket)


def serve_resident(resident: Answering, socket: Path) -> None:
    """Serve what answers for a site until the process is asked to end (SIGTERM, SIGINT); it ends with this call.

    Raises:
        FedtuneError: if it cannot begin.
    """
    server = AgentServer(resident, socket)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server.start()
    ended.wait()
    server.stop()
    logger.info("ended")
    logging.shutdown()
    # A round that is still training is cut off here: it was charged, and is trained again under the same charge.
    os._exit(0)


def _make_folder(folder: Path) -> None:
    """Make the socket's folder, or take the one that is there.

    Raises:
        RunError: for a folder that everybody may enter, or none.
    """
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chmod(folder, FOLDER_MODE)
    except OSError as error:
        raise RunError(f"folder {folder} of the agent's socket cannot be used ({error.strerror}).") from None
    if folder.is_symlink() or folder.stat().st_mode & 0o007:
        raise RunError(
            f"folder {folder} of the agent's socket is open to everybody; expected one for its owner and group. "
            "Make it so: chmod 2750."
        )


def _lock(path: Path) -> int:
    """Hold a lock for as long as the process lives: gRPC would take a socket away from an agent that listens."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(f"another agent listens beside {path}; expected one. Stop it: fedtune-client down.") from None
    return descriptor
