"""The operator's side of the control service."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc

from common.control import control_pb2, control_pb2_grpc
from common.errors import ConfigError, RunError
from server.control.addressee import addressed_to
from server.run_place import RunPlace
from server.server_config import ServerConfig
from server.state_folder import StateFolder

CALL_S = 10.0

View = dict[str, Any]
"""A run at one moment, as plain values with the names of RunView in control.proto."""


class ControlClient:
    """Calls to the ServerApp of one run: another run's does nothing and says which it is.

    Args:
        channel: to it.
        run: its name.
        tcp: whether the channel is TCP, which the ServerApp may be without.
    """

    def __init__(self, channel: grpc.Channel, run: str, *, tcp: bool = False) -> None:
        self._stub, self._run, self._tcp = control_pb2_grpc.ControlStub(channel), run, tcp

    def status(self) -> View:
        """Return where the run stands."""
        return self._call("Status", control_pb2.StatusRequest())

    def pause(self) -> View:
        """Let no further round begin."""
        return self._call("Pause", control_pb2.PauseRequest())

    def resume(self) -> View:
        """Let a paused run go on."""
        return self._call("Resume", control_pb2.ResumeRequest())

    def stop(self, *, after_round: bool) -> View:
        """End the run, now or after the round in progress."""
        return self._call("Stop", control_pb2.StopRequest(after_round=after_round))

    def set(self, key: str, value: str) -> View:
        """Set what may change between rounds."""
        return self._call("Set", control_pb2.SetRequest(key=key, value=value))

    def watch(self) -> Iterator[View]:
        """Yield where the run stands whenever that changes; the last one has ended.

        Raises:
            RunError: if the ServerApp is lost on the way.
            ConfigError: if another run's answers.
        """
        try:
            for view in self._stub.Watch(control_pb2.WatchRequest(), metadata=addressed_to(self._run)):
                yield as_values(view)
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _call(self, method: str, request: Any) -> View:
        try:
            call = getattr(self._stub, method)
            return as_values(call(request, timeout=CALL_S, metadata=addressed_to(self._run)))
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _explained(self, error: grpc.RpcError) -> ConfigError | RunError:
        if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
            return ConfigError(str(error.details()))
        alone = ", or answer on its unix socket alone: leave out --tcp" if self._tcp else ": see fedtune-server status"
        return RunError(
            f"the ServerApp of run {self._run!r} does not answer ({error.code().name.lower()}); expected it to. It may "
            f"be starting or ending{alone}."
        )


@contextlib.contextmanager
def connected(
    state: StateFolder, place: RunPlace, config: ServerConfig, *, tcp: bool = False
) -> Iterator[ControlClient]:
    """Connect to the ServerApp of a run.

    Args:
        state: the state folder.
        place: the run's.
        config: the server config.
        tcp: over TCP with the operator's certificate in place of the unix socket.

    Raises:
        RunError: if no ServerApp works on the run.
        ConfigError: with ``tcp``, if the server config has no port for it.
    """
    if not place.is_live():
        raise RunError(
            f"no ServerApp works on run {place.name!r} now; expected one. Its submission is "
            f"{place.submission().state!r}: see fedtune-server runs."
        )
    if not tcp:
        channel = grpc.insecure_channel(f"unix:{place.socket}")
    elif config.control_port is None:
        raise ConfigError("control_port is not set; expected a port in server.yaml for --tcp. Set it.")
    else:
        credentials = operator_credentials(state)
        channel = grpc.secure_channel(f"127.0.0.1:{config.control_port}", credentials)
    with channel:
        yield ControlClient(channel, place.name, tcp=tcp)


def operator_credentials(state: StateFolder) -> grpc.ChannelCredentials:
    """Return what an operator shows over TCP, and whom it takes for the coordinator."""
    return grpc.ssl_channel_credentials(
        state.ca_certificate.read_bytes(), state.key("operator").read_bytes(),
        state.certificate("operator").read_bytes(),
    )  # fmt: skip


def as_values(view: control_pb2.RunView) -> View:
    """Return a view as plain values; what is absent is None."""
    values: View = {}
    for field in view.DESCRIPTOR.fields:
        value = getattr(view, field.name)
        if field.name == "sites":
            value = [as_values(site) for site in value]
        elif field.name == "metrics":
            value = dict(value)
        elif field.has_presence and not view.HasField(field.name):
            value = None
        values[field.name] = value
    return values
