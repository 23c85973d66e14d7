"""The server config: what belongs to the coordinator alone. ``fedtune-server init`` writes it; it never travels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from common.config.load import read_config_text, validate_section
from common.config.section import Section
from common.config.yaml_text import parse_yaml
from common.wire import SiteName

Port = Annotated[int, Field(ge=1, le=65535)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$|^[0-9A-Fa-f:]{2,45}$")]
Seconds = Annotated[float, Field(gt=0, le=86400)]

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):([0-9]{1,5})")


class LimitsConfig(Section):
    """What the gateway takes from whoever reaches its port."""

    body_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """Largest body of a request. Flower cuts what it sends into pieces of at most 5 MiB."""
    header_bytes: Annotated[int, Field(ge=1024)] = 16384
    """Largest header of a request."""
    handshake_timeout_s: Seconds = 10.0
    """Seconds for the TLS handshake."""
    header_timeout_s: Seconds = 10.0
    """Seconds from the connection, or from the first byte of a further request, to the end of the header."""
    idle_timeout_s: Seconds = 30.0
    """Seconds without a byte of a body that has begun; also how long a connection without a request is kept."""
    request_timeout_s: Seconds = 900.0
    """Seconds for a whole request: 16 MiB over a link of 1 Mbit/s take 135."""
    upstream_timeout_s: Seconds = 60.0
    """Seconds to wait for the SuperLink."""
    requests_per_s: Annotated[float, Field(gt=0)] = 100.0
    """Requests a second of one peer address, on average. More have to wait."""
    burst: Annotated[int, Field(ge=1)] = 400
    """Requests of one peer address that may come at once."""
    queue_timeout_s: Seconds = 10.0
    """Longest that a request over the rate waits; one that would wait longer is refused with 503."""
    connections: Annotated[int, Field(ge=2)] = 512
    """Open connections in all, from accept on; one more is closed at once."""
    connections_per_peer: Annotated[int, Field(ge=1)] = 64
    """Open connections of one peer address, from accept on; one more is closed at once."""


class ServerConfig(Section):
    """A coordinator: its federation, its names, its ports, its limits."""

    federation: SiteName
    """Name of the federation."""
    address: str
    """host:port of the gateway, as sites reach it: it goes into every kit."""
    host_names: Annotated[tuple[HostName, ...], Field(min_length=1, strict=False)]
    """Host names and IP addresses in the gateway's certificate; the host of ``address`` must be one of them."""
    listen: HostName = "0.0.0.0"  # noqa: S104 - the gateway is what the outside may reach
    """Address that the gateway binds to."""
    port: Port = 8443
    """Port that the gateway binds to."""
    superlink_port: Port = 8000
    """Port of the SuperLink, on the loopback address only."""
    control_port: Port | None = None
    """Port of the control service on the loopback address with mutual TLS, beside each run's unix socket; the run that
    began first has it."""
    device: str = "auto"
    """Device of the coordinator's own base model: auto, cpu, cuda, cuda:N or mps."""
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        matched = _ADDRESS.fullmatch(self.address)
        if matched is None or not 1 <= int(matched[3]) <= 65535:
            raise ValueError(f"address is {self.address!r}; expected host:port, such as fed.example.org:8443")
        if self.host not in self.host_names:
            raise ValueError(f"host_names lacks {self.host!r}, the host of address; add it, then renew the certificate")
        ports = [port for port in (self.port, self.superlink_port, self.control_port) if port is not None]
        if len(set(ports)) < len(ports):
            raise ValueError("port, superlink_port and control_port are not different; expected one port each")
        return self

    @property
    def host(self) -> str:
        """The host of ``address``, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")


def load_server_config(path: Path) -> ServerConfig:
    """Read a server config from a YAML file.

    Raises:
        ConfigError: naming the file, the line, the key and what to do.
    """
    return validate_section(ServerConfig, parse_yaml(read_config_text(path, "a server config"), str(path)))


def dump_server_config(config: ServerConfig) -> str:
    """Return the config as YAML that :func:`load_server_config` reads back to the same config."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
