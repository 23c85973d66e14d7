"""Coordinator and sites as real processes; see ``python -m simulations.local_federation``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.keys import make_key
from client.places import Places
from common.config.run import RunConfig
from common.errors import RunError
from common.kit import Kit
from server.run_place import find_run
from server.run_view import run_line
from server.server_config import load_server_config
from server.state_folder import StateFolder
from server.supervise.service import listens
from simulations.local_federation.commands import (
    LOOPBACK,
    WAIT_S,
    command,
    free_ports,
    json_of,
    running,
    wait_for,
)

Say = Callable[[str], None]
OVER = ("completed", "stopped", "failed")


@dataclass(frozen=True)
class Way:
    """How a site gets to the coordinator.

    Attributes:
        address: of the gateway, for this site; the usual one if not given.
        inside: command that the site's processes run inside, such as ``ip netns exec NAME``.
    """

    address: str | None = None
    inside: tuple[str, ...] = ()


@dataclass
class LocalFederation:
    """A coordinator that is up, and its sites.

    Attributes:
        folder: with everything in it; its path must be short, for unix sockets.
        address: host:port of the gateway.
        say: is told what happens.
        coordinator: the supervisor's process.
        sites: the supervisors' processes by site.
        places: where the files of each site are.
        ups: what each site was started with.
    """

    folder: Path
    address: str
    say: Say
    coordinator: subprocess.Popen[bytes]
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    places: dict[str, Places] = field(default_factory=dict)
    ups: dict[str, Sequence[str | Path]] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.folder / "coordinator"

    def enrol(self, name: str, public_key: Path, address: str | None = None) -> Path:
        """Enrol a site at the coordinator and return its kit, with another address of the gateway if one is given."""
        kit = public_key.parent / "coordinator.kit.yaml"
        command("server", "sites", "add", name, public_key, "--state", self.state)
        file = self.state / "server.yaml"
        usual = file.read_text(encoding="utf-8")
        file.write_text(usual.replace(self.address, address or self.address), encoding="utf-8")
        command("server", "sites", "kit", name, "--out", kit, "--state", self.state)
        file.write_text(usual, encoding="utf-8")
        return kit

    def start_site(self, site: str, places: Places, up: Sequence[str | Path], ends: contextlib.ExitStack) -> None:
        """Start a site, for the first time or after it was killed, and have it end with ``ends``."""
        self.places[site], self.ups[site] = places, up
        self.sites[site] = ends.enter_context(running(up, places.folder / "up.log"))

    def wait_until_connected(self) -> None:
        """Wait until every enrolled site is connected."""

        def connected() -> bool:
            listed = json_of("server", "sites", "list", "--state", self.state)
            return all(site["connection"] == "online" for site in listed if site["state"] == "enrolled")

        def started() -> bool:
            return all(log.exists() and b"SuperNode ID" in log.read_bytes() for log in logs)

        logs = [places.log("supernode") for places in self.places.values()]
        processes = [self.coordinator, *self.sites.values()]
        wait_for(started, "the sites to start", processes)  # costs nothing, where asking costs a process
        wait_for(connected, "the sites to connect", processes, look_s=2.0)
        self.say(f"{len(self.sites)} sites are connected")

    def submit(self, config: Path, *overrides: str) -> str:
        """Submit a run and return its name."""
        options = [part for override in overrides for part in ("--set", override)]
        name: str = json_of("server", "run", config, *options, "--state", self.state)["run"]
        self.say(f"{name}: submitted")
        return name

    def wait_until_over(self, run: str) -> dict[str, Any]:
        """Wait until a run is over and return its line.

        Raises:
            RunError: if it was not completed.
        """
        place = find_run(StateFolder.open(self.state), run)  # and no command: its start would cost more than it says
        said, deadline = 0, time.monotonic() + WAIT_S
        while True:
            line = run_line(place)
            if line["completed_rounds"] > said:
                said, deadline = line["completed_rounds"], time.monotonic() + WAIT_S
                self.say(f"{run}: round {said}/{line['rounds']}")
            if line["state"] in OVER:
                break
            if time.monotonic() > deadline:
                raise RunError(f"run {run!r} completed no round in {WAIT_S:g} s; expected one. Look at the logs.")
            time.sleep(1.0)
        if line["state"] != "completed":
            raise RunError(f"run {run!r} ended as {line['state']!r} ({line['reason']}); expected it to be completed.")
        return dict(line)

    def export(self, run: str) -> Path:
        """Copy what a run has left and return the folder."""
        folder = self.folder / "exported" / run
        command("server", "export", run, "--to", folder, "--state", self.state)
        return folder


@contextlib.contextmanager
def local_coordinator(folder: Path, name: str, say: Say, host: str = LOOPBACK) -> Iterator[LocalFederation]:
    """Make a coordinator, whose gateway listens on ``host``, and keep it up for as long as the context lasts."""
    public, superlink = free_ports(2)
    state = folder / "coordinator"
    command(
        "server", "init", "--federation", name, "--address", f"{host}:{public}", "--listen", host,
        "--superlink-port", str(superlink), "--device", "cpu", "--state", state,
    )  # fmt: skip
    say(f"coordinator: the gateway is {host}:{public}, the SuperLink {LOOPBACK}:{superlink}")
    with coordinator_up(folder) as process:
        yield LocalFederation(folder, f"{host}:{public}", say, process)


@contextlib.contextmanager
def coordinator_up(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Keep the coordinator of a folder up for as long as the context lasts."""
    state = folder / "coordinator"
    config = load_server_config(state / "server.yaml")
    up: list[str | Path] = [sys.executable, "-m", "server.cli", "up", "--state", state]
    with running(up, folder / "coordinator.log") as process:
        doors = ((config.port, config.listen), (config.superlink_port, LOOPBACK))
        wait_for(lambda: all(listens(*door) for door in doors), "the coordinator to be up", [process])
        yield process


@contextlib.contextmanager
def real_sites(
    federation: LocalFederation,
    config: RunConfig,
    files: Mapping[str, Path],
    epsilon: float,
    ways: Mapping[str, Way] | None = None,
) -> Iterator[None]:
    """Make sites with agent, policy and ledger, and keep them up for as long as the context lasts.

    Args:
        federation: that they join.
        config: whose task, labels, base model and rank they allow.
        files: private rows by site, each in the folder of its site.
        epsilon: budget of each.
        ways: of sites that get to the coordinator otherwise than straight.
    """
    labels = ",".join(map(str, config.data.labels or ()))
    with contextlib.ExitStack() as ends:
        for site, rows in files.items():
            folder = rows.parent
            command(
                "client", "init", folder, "--name", site, "--data", rows, "--task", config.data.task,
                "--labels", labels, "--model", config.model.source, "--epsilon", str(epsilon),
                "--delta", str(config.privacy.delta), "--device", "cpu",
                "--largest-rank", str(config.adapter.rank),
            )  # fmt: skip
            way = (ways or {}).get(site, Way())
            kit = federation.enrol(site, folder / "keys" / "site.pub", way.address)
            told = Kit.read(kit).fingerprint()  # read out by telephone, where there are two people
            command("client", "enroll", kit, "--site", folder / "site.yaml", "--fingerprint", told)
            places = Places.beside(folder / "site.yaml")
            up: list[str | Path] = [*way.inside, sys.executable, "-m", "client.cli", "up", places.site_config]
            federation.start_site(site, places, up, ends)
            federation.say(f"{site}: enrolled, with {len(rows.read_text().splitlines())} rows of its own")
        federation.wait_until_connected()
        yield


@contextlib.contextmanager
def virtual_nodes(federation: LocalFederation, files: Mapping[str, Path]) -> Iterator[None]:
    """Make sites that run as real ones do but answer as in a simulation: no privacy, no ledger.

    Real sites take part in no run without noise, so this is how a deployment's adapter is compared with that of a
    simulation.
    """
    with contextlib.ExitStack() as ends:
        for number, (site, rows) in enumerate(sorted(files.items())):
            places = Places.beside(rows.parent / "site.yaml")
            make_key(places)
            kit = federation.enrol(site, places.public_key)
            module = "simulations.local_federation.virtual_site"
            which: list[str | Path] = [places.site_config, kit, str(number), str(len(files))]
            up = [sys.executable, "-m", module, "site", *which]
            federation.start_site(site, places, up, ends)
        federation.wait_until_connected()
        yield
