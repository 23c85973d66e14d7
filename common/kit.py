"""The kit: what the coordinator gives to one site so that it can join, in one signed file.

It names the federation and the site, the address of the gateway and the certificate that the gateway is known by. The
coordinator's key signs it; the site's engineer compares that key's fingerprint by telephone, because a kit that
somebody else made is signed just as well, with a key of theirs. A kit holds nothing secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import AfterValidator, Field

from common.atomic import write_atomic
from common.config.load import validate_section
from common.config.section import Section
from common.config.yaml_text import parse_yaml
from common.errors import ConfigError
from common.wire import SiteName

LARGEST_BYTES = 65536
"""A kit file that is larger is not read."""

FINGERPRINT_DIGITS = 40
"""Hexadecimal digits of a key's fingerprint: 160 bits, for which nobody finds a second key."""

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>[0-9]{1,5})")


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the start of the SHA-256 of a public key (DER, SubjectPublicKeyInfo), in groups of four digits."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digits = hashlib.sha256(der).hexdigest()[:FINGERPRINT_DIGITS]
    return " ".join(digits[start : start + 4] for start in range(0, FINGERPRINT_DIGITS, 4))


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are the same, however they are spaced and in whatever case."""
    plain = [re.sub(r"[\s:-]", "", text).lower() for text in (one, other)]
    return plain[0] == plain[1] and len(plain[0]) == FINGERPRINT_DIGITS


def _address(text: str) -> str:
    matched = _ADDRESS.fullmatch(text)
    if matched is None or not 1 <= int(matched["port"]) <= 65535:
        raise ValueError("address is no host:port; expected for instance gateway.example.org:8443")
    return text


def _certificate(pem: str) -> str:
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        found = []
    if not found:
        raise ValueError("ca_certificate is no certificate; expected PEM")
    return pem


def _public_key(pem: str) -> str:
    _load_key(pem)
    return pem


def _load_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("coordinator_key is no key on the curve P-384; expected PEM")
    return key


class _Dumper(yaml.SafeDumper):
    """Writes keys and certificates line by line, as people know them."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


class Kit(Section):
    """What one site gets. Its values are checked when it is made; whether it is signed, by :meth:`verify`."""

    format: Literal[1] = 1
    """Number of this file format."""
    federation: SiteName
    """Name of the federation."""
    site: SiteName
    """Name of the site in the federation."""
    address: Annotated[str, AfterValidator(_address)]
    """host:port of the gateway, as the site reaches it."""
    ca_certificate: Annotated[str, AfterValidator(_certificate)]
    """Certificate of the authority that the gateway's own is signed by, in PEM."""
    not_after: Annotated[date, Field(strict=False)]
    """Last day (UTC) on which the kit may be enrolled."""
    coordinator_key: Annotated[str, AfterValidator(_public_key)]
    """The coordinator's public key (EC, P-384), in PEM."""
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")] = ""
    """ECDSA with SHA-384 over the canonical JSON of the other keys, in base64; empty before :meth:`sign`."""

    @property
    def host(self) -> str:
        """The gateway's host name or IP address, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The gateway's port."""
        return int(self.address.rpartition(":")[2])

    def signed_bytes(self) -> bytes:
        """Return what is signed: canonical JSON (sorted keys, no spaces, UTF-8) of all keys but the signature."""
        values = self.model_dump(mode="json", exclude={"signature"})
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def fingerprint(self) -> str:
        """Return the fingerprint of the coordinator's key, to be compared by telephone."""
        return key_fingerprint(_load_key(self.coordinator_key))

    def sign(self, private_key: ec.EllipticCurvePrivateKey) -> Kit:
        """Return this kit, signed.

        Raises:
            ConfigError: if the key is not the one that the kit names.
        """
        if key_fingerprint(private_key.public_key()) != self.fingerprint():
            raise ConfigError("the kit names another coordinator_key; expected that of the key which signs it.")
        signature = private_key.sign(self.signed_bytes(), ec.ECDSA(hashes.SHA384()))
        return self.model_copy(update={"signature": base64.b64encode(signature).decode()})

    def verify(self, now: datetime | None = None) -> None:
        """Check that the coordinator's key signed this kit and that its last day is not over.

        It says nothing of whose key that is: see :meth:`fingerprint`.

        Args:
            now: the time to check against; the system's if not given.

        Raises:
            ConfigError: if it is not signed by the key that it names, or too old.
        """
        try:
            signature = base64.b64decode(self.signature, validate=True)
            _load_key(self.coordinator_key).verify(signature, self.signed_bytes(), ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, binascii.Error):
            raise ConfigError(
                f"the kit of {self.site} is not signed by its coordinator_key; expected it as the coordinator made it. "
                "Ask for it again."
            ) from None
        today = (now or datetime.now(UTC)).astimezone(UTC).date()
        if today > self.not_after:
            raise ConfigError(
                f"the kit of {self.site} ended on {self.not_after}; expected that day or before. Ask for a new one."
            )

    def write(self, path: Path) -> None:
        """Write the kit as YAML."""
        text = yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        write_atomic(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> Kit:
        """Read a kit from a file; see :meth:`verify`.

        Raises:
            ConfigError: if it is not there, too large, or no kit.
        """
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); expected a kit. Check the path.") from None
        if len(content) > LARGEST_BYTES:
            raise ConfigError(f"{path} is larger than {LARGEST_BYTES} bytes; expected a kit. Check the path.")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text; expected a kit. Check the path.") from None
        return validate_section(cls, parse_yaml(text, path.name))
