"""A virtual site that runs as a real one does: agent, SuperNode and executor, under the supervisor of a site.

Its agent answers as in a simulation, without privacy or ledger, with the same bits every time. Real sites take part in
no run without noise, so this is how bits of a deployment are compared.

::

    python -m simulations.local_federation.virtual_site site SITE_CONFIG KIT NUMBER COUNT
    python -m simulations.local_federation.virtual_site agent SOCKET NUMBER COUNT
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from client.agent.server import serve_resident
from client.answers import answer
from client.places import Places
from client.refusals import log_line, refusal_of
from client.site import virtual_site
from client.supervise.components import (
    Component,
    environment,
    executor_command,
    free_port,
    supernode_command,
    write_files,
)
from client.supervise.running import only_one
from client.supervise.supervisor import Supervisor
from common.flower_keys import CONFIG_YAML
from common.kit import Kit
from common.models.resident import loads, resident_model
from common.quiet import quiet_dependencies
from common.run_source import run_config_of
from common.wire import header_bytes

logger = logging.getLogger(__name__)


class VirtualResident:
    """One site of a simulation, behind an agent's socket.

    Args:
        number: of the site, from 0.
        count: of all sites.
    """

    def __init__(self, number: int, count: int) -> None:
        self._node = {"partition-id": number, "num-partitions": count}
        self._one = threading.Lock()

    def answer(self, kind: str, config_yaml: bytes, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Return header and payload of the answer; a refusal for whatever cannot be answered."""
        with self._one:
            began = time.monotonic()
            try:
                config = run_config_of({CONFIG_YAML: config_yaml.decode("utf-8")})
                model = resident_model(config, "cpu")
                answered = answer(kind, header, payload, virtual_site(config, self._node, model), config, model)
            except Exception as error:  # noqa: BLE001 - as a real site answers
                logger.error("refused: %s", log_line(error))
                answered = header_bytes(refusal_of(error)), b""
            logger.info("answered a %s in %.1f s", kind, time.monotonic() - began)
            return answered

    def status(self) -> dict[str, Any]:
        """Return how often the base model was loaded."""
        return {"model_loads": loads()}


def components(places: Places, kit: Kit, number: str, count: str) -> tuple[Component, ...]:
    """Return the components of a virtual site; but for the agent's command, those of a real one."""
    port, socket = free_port(), places.state / "run" / "agent.sock"
    secrets = (places.secret("supernode"), places.secret("executor"))
    commands = {
        "agent": (sys.executable, "-P", "-m", __spec__.name, "agent", str(socket), number, count),
        "supernode": supernode_command(kit, places.private_key, places.ca_certificate, secrets[0], socket, port),
        "executor": executor_command(secrets[1], port),
    }
    return tuple(
        Component(name, command, environment(name, places.own_folder(name)), places.log(name), places.own_folder(name))
        for name, command in commands.items()
    )


def main() -> None:
    """Run a site, or its agent, until told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    what, *rest = sys.argv[1:]
    if what == "agent":
        quiet_dependencies()
        serve_resident(VirtualResident(int(rest[1]), int(rest[2])), Path(rest[0]))
        return
    places, kit = Places.beside(Path(rest[0])), Kit.read(Path(rest[1]))
    with only_one(places):
        write_files(places, kit)
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        Supervisor(components(places, kit, rest[2], rest[3]), places.running).run(ended)


if __name__ == "__main__":
    main()
