"""Signs a dead SuperNode off, so that the coordinator knows at once and its successor is let in.

A SuperNode that was killed counts as connected for a minute after its last heartbeat. Until then its successor is
refused, and the coordinator waits for answers that will not come. So each start first says, signed with the site's own
key, that the one before is gone.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.atomic import write_atomic

_HEARTBEAT_S = 30.0
"""What Flower's own SuperNode asks for."""


def sign_off(address: str, ca_certificate: Path, key: ec.EllipticCurvePrivateKey, known: Path) -> bool:
    """Sign off whatever is connected with a site's key.

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
        if not known.exists():  # the first start: connecting tells the id
            request = ActivateNodeRequest(
                public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=_HEARTBEAT_S
            )
            node = client.ActivateNode(request).node_id
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, str(node).encode())
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            return False
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=int(known.read_text(encoding="ascii"))))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                known.unlink()  # the id is another federation's, or the site was enrolled anew
                raise
            return False  # nothing was connected
        return True
