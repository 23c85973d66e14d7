"""Enrolled sites: what is refused, what is kept, and that the SuperLink follows the registry."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.errors import ConfigError, RunError
from server.enrolment import Enrolment
from server.flower_commands import Flower, KeyInUseError
from server.state_folder import StateFolder
from tests.server.coordinator import coordinator, site_key


class Registrar(Flower):
    """Keeps what it is asked to register; refuses what a SuperLink refuses, and fails where told to."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.away: set[int] = set()
        self.fails_after: int | None = None
        self.loses_answer: BaseException | None = None

    def register(self, public_key: str, name: str) -> int:
        if self.fails_after == len(self.known):
            raise RunError("the SuperLink is gone; expected it.")
        if public_key in self.known.values():
            raise KeyInUseError("public key already in use; expected a new one.")
        node = 1000 + len(self.known)
        self.known[node] = public_key
        self.lose_answer()
        return node

    def unregister(self, node_id: int) -> None:
        if node_id not in self.known or node_id in self.away:
            raise RunError("node ID not found for account; expected one that is registered.")
        self.away.add(node_id)
        self.lose_answer()

    def lose_answer(self) -> None:
        lost, self.loses_answer = self.loses_answer, None
        if lost is not None:
            raise lost

    def admitted(self) -> set[str]:
        """The keys that may connect."""
        return {key for node, key in self.known.items() if node not in self.away}

    def nodes(self) -> dict[int, str]:
        return {node: "unregistered" if node in self.away else "online" for node in self.known}


@pytest.fixture
def state() -> Iterator[StateFolder]:
    with coordinator() as made:
        yield made


def public(curve: ec.EllipticCurve) -> str:
    key = ec.generate_private_key(curve).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def ed25519_key() -> str:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


NO_KEYS = {
    "nothing": "",
    "text": "hello",
    "private key": site_key()[0].decode(),
    "another curve": public(ec.SECP256R1()),
    "another kind": ed25519_key(),
    "pem": ec.generate_private_key(ec.SECP384R1())
    .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    .decode(),
}


@pytest.mark.parametrize("kind", NO_KEYS)
def test_file_without_a_p384_public_key_is_refused(state: StateFolder, kind: str) -> None:
    with pytest.raises(ConfigError, match="P-384"):
        Enrolment(state).add("one", NO_KEYS[kind])
    assert not Enrolment(state).sites()


def test_key_and_name_are_taken_once(state: StateFolder) -> None:
    enrolment, (_, key), (_, other) = Enrolment(state), site_key(), site_key()
    enrolment.add("one", key + " a comment")
    with pytest.raises(ConfigError, match="'one'"):
        enrolment.add("two", key)
    with pytest.raises(ConfigError, match="another name"):
        enrolment.add("one", other)


def test_revoked_key_is_never_taken_again_but_its_name_may_be(state: StateFolder) -> None:
    enrolment, (_, key), (_, fresh) = Enrolment(state), site_key(), site_key()
    enrolment.add("one", key)
    enrolment.revoke("one")
    with pytest.raises(ConfigError, match="enrolled"):
        enrolment.add("one", key)
    assert enrolment.add("one", fresh).revoked is None
    assert [site.revoked is None for site in enrolment.sites()] == [False, True]


def test_superlink_follows_the_registry(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    for name in ("one", "two", "three"):
        enrolment.add(name, site_key()[1])
    assert not enrolment.settled()
    enrolment.reconcile(registrar)
    assert enrolment.settled()
    assert sorted(enrolment.members().values()) == ["one", "three", "two"]
    node = enrolment.get("two").node_id
    enrolment.revoke("two")
    assert "two" not in enrolment.members().values()
    enrolment.reconcile(registrar)
    assert registrar.away == {node}
    assert enrolment.settled()
    assert enrolment.reconcile(registrar) == []


def test_site_revoked_before_it_was_registered_never_is(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    enrolment.add("one", site_key()[1])
    enrolment.revoke("one")
    assert enrolment.reconcile(registrar) == []
    assert not registrar.known


def test_what_was_registered_before_a_failure_is_kept(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    for name in ("one", "two"):
        enrolment.add(name, site_key()[1])
    registrar.fails_after = 1
    with pytest.raises(RunError):
        enrolment.reconcile(registrar)
    registrar.fails_after = None
    assert [site.name for site in enrolment.reconcile(registrar)] == ["two"]


def test_site_registered_by_a_process_that_died_before_it_wrote_so_is_found(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    site = enrolment.add("one", site_key()[1])
    node = registrar.register(site.public_key, site.name)
    assert [known.node_id for known in enrolment.reconcile(registrar)] == [node]


LOST = [KeyboardInterrupt(), RunError("flwr did not answer; expected the SuperLink.")]
"""The process ends once the SuperLink has done what it was asked for; or goes on without its answer."""


@pytest.mark.parametrize("lost", LOST)
def test_site_turned_away_before_that_was_written_down_is_settled_the_next_time(
    state: StateFolder, lost: BaseException
) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    for name in ("one", "two"):
        enrolment.add(name, site_key()[1])
    enrolment.reconcile(registrar)
    enrolment.revoke("one")
    registrar.loses_answer = lost
    with contextlib.suppress(KeyboardInterrupt):
        enrolment.reconcile(registrar)
    Enrolment(state).reconcile(registrar)
    assert enrolment.settled()
    assert registrar.admitted() == {enrolment.get("two").public_key}


def test_node_that_the_superlink_lost_is_turned_away(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    enrolment.add("one", site_key()[1])
    enrolment.reconcile(registrar)
    enrolment.revoke("one")
    registrar.known.clear()
    enrolment.reconcile(registrar)
    assert enrolment.settled()


def test_site_that_the_superlink_does_not_turn_away_stays_to_be_turned_away(state: StateFolder) -> None:
    enrolment = Enrolment(state)

    class Deaf(Registrar):
        def unregister(self, node_id: int) -> None:
            raise RunError("the SuperLink is busy; expected an answer.")

    registrar = Deaf()
    enrolment.add("one", site_key()[1])
    enrolment.reconcile(registrar)
    enrolment.revoke("one")
    with pytest.raises(RunError, match="busy"):
        enrolment.reconcile(registrar)
    assert not enrolment.settled()


@pytest.mark.parametrize("lost", LOST)
def test_site_revoked_while_its_registration_was_not_written_down_is_turned_away(
    state: StateFolder, lost: BaseException
) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    enrolment.add("one", site_key()[1])
    registrar.loses_answer = lost
    with contextlib.suppress(KeyboardInterrupt, RunError):
        enrolment.reconcile(registrar)
    assert len(registrar.admitted()) == 1
    enrolment.revoke("one")
    assert not enrolment.settled()
    site = enrolment.add("two", site_key()[1])
    enrolment.reconcile(registrar)
    assert enrolment.settled()
    assert registrar.admitted() == {site.public_key}
    ((node, name),) = enrolment.members().items()
    assert (registrar.known[node], name) == (site.public_key, "two")


def test_site_revoked_while_its_registration_failed_never_gets_in(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    enrolment.add("one", site_key()[1])
    registrar.fails_after = 0
    with pytest.raises(RunError, match="gone"):
        enrolment.reconcile(registrar)
    enrolment.revoke("one")
    registrar.fails_after = None
    enrolment.reconcile(registrar)
    assert enrolment.settled()
    assert not registrar.admitted()


def test_node_of_another_is_never_taken_for_that_of_a_site_whose_registration_failed(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    registrar.register(site_key()[1], "by hand")
    enrolment.add("one", site_key()[1])
    registrar.fails_after = 1
    with pytest.raises(RunError, match="gone"):
        enrolment.reconcile(registrar)
    assert enrolment.members() == {}
    registrar.fails_after = None
    enrolment.reconcile(registrar)
    assert enrolment.members() == {1001: "one"}


def test_nodes_that_cannot_be_told_apart_are_nobodys(state: StateFolder) -> None:
    enrolment, registrar = Enrolment(state), Registrar()
    site = enrolment.add("one", site_key()[1])
    for key in (site.public_key, site_key()[1]):
        registrar.register(key, "by hand")
    with pytest.raises(RunError, match="1000, 1001"):
        enrolment.reconcile(registrar)
    assert enrolment.members() == {}


def test_damaged_registry_admits_nobody(state: StateFolder) -> None:
    Enrolment(state).add("one", site_key()[1])
    values = json.loads(state.sites.read_text())
    values["sites"][0]["colour"] = "red"
    state.sites.write_text(json.dumps(values))
    with pytest.raises(RunError, match="damaged"):
        Enrolment(state).members()


def test_unknown_site_is_named_with_those_there_are(state: StateFolder, tmp_path: Path) -> None:
    Enrolment(state).add("one", site_key()[1])
    with pytest.raises(ConfigError, match="expected one of: one"):
        Enrolment(state).revoke("two")
