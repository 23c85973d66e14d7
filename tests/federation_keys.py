"""Keys, certificates and kits of a federation that exists in tests alone."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.kit import Kit


@lru_cache(maxsize=16)
def ec_key(which: str) -> ec.EllipticCurvePrivateKey:
    """A key for each name, the same in one process."""
    return ec.generate_private_key(ec.SECP384R1())


def _builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
    return (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=30))
    )


def authority(which: str = "authority") -> x509.Certificate:
    """The self-signed certificate of an authority."""
    key = ec_key(which)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = _builder(which, which, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())


def server_files(which: str = "authority", host: str = "127.0.0.1") -> tuple[bytes, bytes]:
    """Certificate and private key, in PEM, of a server at ``host``, signed by an authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names.append(x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host))
    made = (
        _builder("server", which, key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ec_key(which), hashes.SHA384())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM), private


def public_pem(which: str = "coordinator") -> str:
    """A public key in PEM."""
    return ec_key(which).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def unsigned_kit(**changes: Any) -> Kit:
    """A kit that nobody signed yet."""
    values = {
        "federation": "clinics", "site": "north", "address": "localhost:8443", "not_after": "2200-01-01",
        "ca_certificate": authority().public_bytes(Encoding.PEM).decode(), "coordinator_key": public_pem(),
    }  # fmt: skip
    return Kit.model_validate(values | changes)
