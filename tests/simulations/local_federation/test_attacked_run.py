"""Outsiders at the gateway's port while a run of two real sites is on: none gets in, and the run goes on."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from common.config.run import RunConfig
from server.authority import new_authority
from server.gateway.serve import gateway_server
from server.server_config import ServerConfig
from server.state_folder import StateFolder
from server.supervise.service import component_states
from simulations.local_federation.faults.checks import budget_is_right, each_round_once, entries_of, rounds_of
from simulations.local_federation.faults.disturbed import Disturbed, disturbed_federation
from tests.server.coordinator import LOOPBACK, free_port, site_key
from tests.server.gateway.running import Running, drip, overflow, read_to_end, serving
from tests.server.gateway.test_accept import OTHER, has_other, is_closed
from tests.server.gateway.test_gateway import HEAD, NOT_THE_FLEET, with_certificate
from tests.server.test_live_coordinator import WAIT_S, Live, wait_until

ROUNDS, UNDER_ATTACK = 12, 2
"""Of the run, so many that it is on until the last outsider is turned away; and those that are completed meanwhile."""
ROUND_S = 600.0
FLOODS = "127.0.0.3"
FLEET = HEAD + b"content-type: application/protobuf\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOLD = {
    "unregistered": "Failed to activate SuperNode",
    "revoked": "Failed to activate SuperNode",
    "authority": "certificate verify failed: unable to get local issuer certificate",
    "host": "certificate verify failed: Hostname mismatch",
    "expired": "certificate verify failed: certificate has expired",
}
"""What the log of an outsider says of why it did not get in."""
LIMIT_BYTES = ServerConfig.model_fields["limits"].default.body_bytes

pytestmark = [pytest.mark.slow, has_other]


def patient(config: RunConfig) -> RunConfig:
    """The run with rounds that need both sites, however long that takes on a busy machine."""
    needs = config.federation.model_copy(update={"min_sites": 2, "round_timeout_s": ROUND_S})
    return config.model_copy(update={"federation": needs})


@contextlib.contextmanager
def expired_gateway(state: StateFolder, folder: Path) -> Iterator[str]:
    """A gateway before the SuperLink whose certificate, of the right authority, has expired; yields its address."""
    copied = StateFolder(folder)
    shutil.copytree(state.tls, copied.tls)
    for own, copy in ((state.ca_key, copied.ca_key), (state.ca_certificate, copied.ca_certificate)):
        shutil.copy(own, copy)
    config = state.config().model_copy(update={"port": free_port()})
    with_certificate(copied, datetime.now(UTC) - timedelta(days=398))
    with serving(*gateway_server(copied, config)):
        yield f"{LOOPBACK}:{config.port}"


@dataclass
class Outsiders:
    """SuperNodes that are to be turned away.

    Attributes:
        live: the coordinator.
        folder: for a folder of each.
        enrolled: key of a site that is enrolled and does not run: it gets in, where nothing but the way there is wrong.
        revoked: key of a site that was revoked.
    """

    live: Live
    folder: Path
    enrolled: bytes
    revoked: bytes

    @classmethod
    def of(cls, live: Live, folder: Path) -> Outsiders:
        """Enrol two sites and revoke one."""
        keys = []
        for name in ("misled", "revoked"):
            private, public = site_key()
            (folder / "site.pub").write_text(public)
            live.command("sites", "add", name, str(folder / "site.pub"))
            keys.append(private)
        live.command("sites", "revoke", "revoked")
        return cls(live, folder, *keys)

    def node(
        self, name: str, key: bytes, authority: Path | None = None, address: str | None = None
    ) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """One of them, in a folder of its own."""
        own = self.folder / name
        own.mkdir()
        return self.live.node(key, own, authority, address)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """All of them at a time; each must give up, by itself and for the right reason, before the context ends."""
        state, other = self.live.state, self.folder / "other.crt"
        other.write_bytes(new_authority("clinics", datetime.now(UTC)).certificate.public_bytes(Encoding.PEM))
        with contextlib.ExitStack() as ends:
            expired = ends.enter_context(expired_gateway(state, self.folder / "copied"))
            nodes = {
                "unregistered": self.node("unregistered", site_key()[0]),
                "revoked": self.node("revoked", self.revoked),
                "authority": self.node("authority", self.enrolled, authority=other),
                "host": self.node("host", self.enrolled, address=f"localhost:{state.config().port}"),
                "expired": self.node("expired", self.enrolled, address=expired),
            }
            processes = {name: ends.enter_context(node) for name, node in nodes.items()}
            yield
            for name, process in processes.items():
                assert process.wait(WAIT_S) != 0, name
                assert TOLD[name] in (self.folder / name / "node.log").read_text(encoding="utf-8"), name


def expect_only_the_fleet_api(gateway: Running) -> None:
    """Control and runtime API, variants of their paths and all else are not there; the fleet API asks who is there."""
    assert gateway.raw(FLEET).split(b" ")[1] == b"401"
    for path in NOT_THE_FLEET:
        asked = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        assert gateway.raw(asked.encode()).split(b" ")[1] in (b"404", b"400"), path


def expect_no_plaintext(gateway: Running) -> None:
    """Who speaks no TLS is not answered."""
    with gateway.plain() as plain:
        plain.sendall(FLEET)
        assert b"HTTP" not in read_to_end(plain)


def expect_no_long_body(gateway: Running) -> None:
    """A body over the limit is refused, declared or not."""
    assert gateway.raw(HEAD + b"content-length: %d\r\n\r\n" % (LIMIT_BYTES + 1)).split(b" ")[1] == b"413"
    with gateway.connection() as secure:
        answer = overflow(secure, HEAD, 2 * LIMIT_BYTES)
    assert answer.split(b" ")[1:2] in ([b"413"], [])


def expect_no_slow_loris(gateway: Running) -> None:
    """Of one address, connections are bounded, and those that never end their header are closed."""
    with contextlib.ExitStack() as held:
        most = gateway.config.limits.connections_per_peer
        silent = [held.enter_context(gateway.plain()) for _ in range(most - 1)]
        with gateway.connection() as dripping:
            with gateway.plain() as over:
                assert is_closed(over)
            assert drip(dripping, HEAD) == b""
        assert all(map(is_closed, silent))


ATTACKS: tuple[tuple[Callable[[Running], None], str], ...] = (
    (expect_only_the_fleet_api, OTHER),
    (expect_no_plaintext, OTHER),
    (expect_no_long_body, OTHER),
    (expect_no_slow_loris, FLOODS),
)


@pytest.fixture(scope="module")
def made() -> Iterator[Disturbed]:
    with disturbed_federation("private", ROUNDS, lambda said: None) as made:
        made.config = patient(made.config)
        yield made


def test_outsiders_are_turned_away_while_a_run_goes_on_to_its_end(made: Disturbed, tmp_path: Path) -> None:
    live = Live(made.state)
    outsiders, gateway = Outsiders.of(live, tmp_path), Running(made.state, made.state.config())
    processes = component_states(made.state)
    place = made.submit("attacked")
    wait_until(lambda: place.completed_rounds() > 0)
    before = place.completed_rounds()

    def holds_out() -> bool:
        for attack, source in ATTACKS:
            attack(replace(gateway, source=source))
        assert not place.submission().over
        return place.completed_rounds() >= before + UNDER_ATTACK

    with outsiders.at_work():
        wait_until(holds_out)
    assert place.completed_rounds() < ROUNDS
    assert not place.submission().over
    connected = {site["name"]: site["connection"] for site in live.command("sites", "list")}
    assert connected == {**dict.fromkeys(made.sites, "online"), "misled": "registered", "revoked": None}

    assert made.wait_until_over(place) == "completed"
    submission = place.submission()
    assert (submission.fence, len(submission.flower_runs)) == (1, 1)
    assert each_round_once(place, ROUNDS)
    for site, places in made.sites.items():
        assert rounds_of(place, site) == set(range(1, ROUNDS + 1))
        assert budget_is_right({}, entries_of(places), place, site, ROUNDS) == []
    assert {site for record in place.folder.iterate_records("round") for site in record["sites"]} == {*made.sites}
    assert component_states(made.state) == processes
    with outsiders.node("after", outsiders.enrolled):
        wait_until(lambda: live.connection("misled") == "online")
