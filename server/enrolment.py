"""Enrolled sites: their names and public keys, and what Flower's SuperLink knows of them.

The registry says who may connect. The SuperLink is brought in step with it (:meth:`Enrolment.reconcile`) whenever it
is up: keys added before are registered then, revoked ones are unregistered. A process may end between asking Flower and
writing the answer down: so a record says beforehand that its key is being registered, and a node that is to be turned
away may be gone already. Records of revoked sites stay, so that a revoked key is never taken again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import Field, ValidationError

from common.atomic import write_atomic
from common.config.section import Section
from common.errors import ConfigError, RunError
from common.kit import key_fingerprint
from common.wire import SiteName
from server.flower_commands import Flower, KeyInUseError
from server.state_folder import StateFolder, locked

UNREGISTERED = "unregistered"
"""Flower's status of a node that was turned away."""


class Site(Section):
    """One enrolled key."""

    name: SiteName
    """Name of the site in the federation."""
    public_key: str
    """The public key in OpenSSH's format, without a comment."""
    fingerprint: str
    """Of the public key, to be compared by telephone."""
    added: str
    """When, UTC."""
    node_id: int | None = None
    """Flower's id of its node; None while the SuperLink does not know the key."""
    registering: bool = False
    """The SuperLink was asked to register the key, and what came of it is not written down: it may know the key."""
    revoked: str | None = None
    """When it was revoked, UTC; None while it may connect."""

    @property
    def settled(self) -> bool:
        """Whether the SuperLink knows the key if and only if it may connect."""
        return not self.registering and (self.node_id is None) == (self.revoked is not None)


class _Registry(Section):
    format: Literal[1] = 1
    sites: Annotated[tuple[Site, ...], Field(strict=False)] = ()


class Enrolment:
    """The registry of a state folder. Several processes may use it at once.

    Args:
        state: the state folder.
    """

    def __init__(self, state: StateFolder) -> None:
        self._state = state

    def sites(self) -> list[Site]:
        """Return all records, revoked ones too, in the order they were added."""
        return list(self._read())

    def members(self) -> dict[int, str]:
        """Return the names of the sites that may connect, by Flower's id of their node."""
        return {s.node_id: s.name for s in self._read() if s.node_id is not None and s.revoked is None}

    def get(self, name: str) -> Site:
        """Return the record of a site that may connect.

        Raises:
            ConfigError: if there is none.
        """
        for site in self._read():
            if site.name == name and site.revoked is None:
                return site
        known = ", ".join(site.name for site in self._read() if site.revoked is None) or "none"
        raise ConfigError(f"no site {name!r} is enrolled; expected one of: {known}.")

    def add(self, name: str, public_key: str, now: datetime | None = None) -> Site:
        """Enrol a site.

        Raises:
            ConfigError: for a name that is taken, a key that is no EC P-384 public key or was enrolled before.
        """
        key = _parse_key(public_key)
        line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        with self._editing() as sites:
            for other in sites:
                if other.public_key == line:
                    raise ConfigError(
                        f"this key was enrolled for {other.name!r} before; expected a new one. Make it at the site."
                    )
                if other.name == name and other.revoked is None:
                    raise ConfigError(f"a site {name!r} is enrolled; expected another name, or revoke that one first.")
            try:
                site = Site(name=name, public_key=line, fingerprint=key_fingerprint(key), added=_moment(now))
            except ValidationError:
                raise ConfigError(
                    f"site name {name!r} is not usable; expected 1 to 128 printable characters."
                ) from None
            sites.append(site)
        return site

    def revoke(self, name: str, now: datetime | None = None) -> Site:
        """Take a site's right to connect. It takes effect with the next :meth:`reconcile`.

        Raises:
            ConfigError: if no such site is enrolled.
        """
        self.get(name)
        with self._editing() as sites:
            at = next(n for n, site in enumerate(sites) if site.name == name and site.revoked is None)
            sites[at] = sites[at].model_copy(update={"revoked": _moment(now)})
            return sites[at]

    def reconcile(self, flower: Flower) -> list[Site]:
        """Register and unregister at the SuperLink what is not in step with the registry; return those records.

        In the order in which they were added, up to the first failure: so the outcome of one registration at most is
        open, and a node that no record names is that one's.

        Raises:
            RunError: if the SuperLink refuses or cannot be reached. What was done until then is kept.
        """
        changed = []
        for site in [site for site in self._read() if not site.settled]:
            known = site if site.node_id is not None else self._registered(flower, site)
            if known.node_id is not None and known.revoked is not None:
                self._turn_away(flower, known.node_id)
                known = self._changed(known, node_id=None)
            changed.append(known)
        return changed

    def settled(self) -> bool:
        """Whether the SuperLink is in step with the registry."""
        return all(site.settled for site in self._read())

    def _registered(self, flower: Flower, site: Site) -> Site:
        """Register a key and return its record with the id of its node: None where a revoked key has none."""
        if not site.registering:
            self._changed(site, registering=True)
        try:
            node_id: int | None = flower.register(site.public_key, site.name)
        except KeyInUseError:
            # Registered by a process that ended before it could write the id down: then one node is nobody's.
            node_id = self._nobodys(flower)
            if node_id is None and site.revoked is None:
                raise
        return self._changed(site, node_id=node_id, registering=False)

    def _nobodys(self, flower: Flower) -> int | None:
        """Return the one node whose id is not written down, None if there is none.

        Raises:
            RunError: if there are several.
        """
        known = {site.node_id for site in self._read()}
        nobodys = [node for node, status in flower.nodes().items() if node not in known and status != UNREGISTERED]
        if len(nobodys) > 1:
            raise RunError(
                f"the SuperLink knows {len(nobodys)} nodes that no record names; expected at most one. Unregister "
                f"those that are no site's with flwr supernode unregister: {', '.join(map(str, nobodys))}."
            )
        return nobodys[0] if nobodys else None

    def _turn_away(self, flower: Flower, node_id: int) -> None:
        try:
            flower.unregister(node_id)
        except RunError:
            # Flower refuses what it has turned away before, for a process that ended before it could write so.
            if flower.nodes().get(node_id, UNREGISTERED) != UNREGISTERED:
                raise

    def _changed(self, site: Site, **changes: Any) -> Site:
        """Change the record of a key and return it as it is then."""
        with self._editing() as sites:
            at = next(n for n, known in enumerate(sites) if known.public_key == site.public_key)
            sites[at] = sites[at].model_copy(update=changes)
            return sites[at]

    def _read(self) -> tuple[Site, ...]:
        try:
            content = self._state.sites.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        try:
            return _Registry.model_validate_json(content).sites
        except ValidationError:
            raise RunError(f"{self._state.sites} is damaged; expected the sites enrolled. Restore the file.") from None

    @contextmanager
    def _editing(self) -> Iterator[list[Site]]:
        with locked(self._state.sites.with_suffix(".lock")):
            sites = list(self._read())
            yield sites
            values = _Registry(sites=tuple(sites)).model_dump(mode="json")
            write_atomic(self._state.sites, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _parse_key(text: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            "the file holds no EC P-384 public key in OpenSSH's format; expected the site.pub that "
            "fedtune-client init made. A private key must stay at the site."
        )
    return key


def _moment(now: datetime | None) -> str:
    return (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
