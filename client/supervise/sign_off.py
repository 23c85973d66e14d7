"""Signs a dead SuperNode off, so that the coordinator knows at once and its successor is let in.

A SuperNode that was killed counts as connected for a minute after its last heartbeat. Until then its successor is
refused, and the coordinator waits for answers that will not come. So each start first says, signed with the site's own
key, that the one before is gone.

Only what ran on this machine since it was started is signed off: its supervisor has seen it end. A SuperNode with the
same key on another machine, with a ledger of its own, would be there still; against that one the refusal stands.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.atomic import write_atomic
from common.errors import ConfigError

logger = logging.getLogger(__name__)

SEEN_S = 4.0
"""Seconds between signing off and connecting anew: a coordinator that waits for this site looks more often."""
_HEARTBEAT_S = 30.0
"""What Flower's own SuperNode asks for."""


def sign_off(address: str, ca_certificate: Path, key: ec.EllipticCurvePrivateKey, known: Path) -> bool:
    """Sign off what an earlier process of this machine connected with a site's key.

    Args:
        address: host:port of the gateway.
        ca_certificate: the authority's certificate.
        key: the site's private key.
        known: file for the id that the coordinator knows the site by.

    Returns:
        Whether something was connected that no longer is.

    Raises:
        httpx.HTTPError: if the coordinator does not answer, or refuses.
    """
    with FleetHttpClient.from_server_address(
        address, False, str(ca_certificate),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())
        ],
    ) as client:  # fmt: skip
        node = remembered(known, _machine())
        if node is None:  # the first start: connecting tells the id, and is refused while another machine is connected
            request = ActivateNodeRequest(
                public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=_HEARTBEAT_S
            )
            node = client.ActivateNode(request).node_id
            remember(known, _machine(), node)
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            return False
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                known.unlink()  # the id is another federation's, or the site was enrolled anew
                raise
            return False  # nothing was connected
        return True


def remember(known: Path, machine: str, node: int) -> None:
    """Keep the id of a node that this machine has connected."""
    known.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(known, f"{machine} {node}".encode())


def remembered(known: Path, machine: str) -> int | None:
    """Return the id of the node, None where this machine has connected none since it was started."""
    try:
        where, text = known.read_text(encoding="ascii").split()
        node = int(text)
    except (OSError, ValueError):
        return None
    return node if machine and where == machine else None


def _machine() -> str:
    """Return what names this machine from its start to its end; nothing where the system has no such name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def sign_off_before(options: Sequence[str]) -> None:
    """Sign off what was connected before, for a SuperNode that is started next.

    Where that does not work, Flower refuses the new one until a minute after the dead one's last heartbeat, and its
    supervisor tries again.

    Args:
        options: of Flower's SuperNode.
    """
    known = Path(os.environ["FLWR_HOME"]) / "node-id"
    try:
        key = _key(Path(_option(options, "--auth-supernode-private-key")))
        if sign_off(_option(options, "--superlink"), Path(_option(options, "--root-certificates")), key, known):
            logger.warning("the SuperNode before this one was still connected; it is signed off")
            time.sleep(SEEN_S)
    except (httpx.HTTPError, ConfigError, OSError, ValueError) as error:
        logger.warning("nothing could be signed off (%s)", type(error).__name__)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the site's key where Flower reads it: under systemd that is a credential, with other permissions."""
    key = load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no EC key; expected the one that fedtune-client init made. Restore it.")
    return key


def _option(options: Sequence[str], name: str) -> str:
    return options[options.index(name) + 1]
