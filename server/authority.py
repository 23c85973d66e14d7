"""The federation's own certificate authority: who the coordinator is, to sites and to its operators.

=============  ===========================================  ==========================
certificate    for                                          extended key usage
=============  ===========================================  ==========================
``gateway``    what sites connect to                        serverAuth
``superlink``  the SuperLink on the loopback address        serverAuth
``control``    the control service on TCP                   serverAuth
``operator``   whoever steers runs over TCP                 clientAuth
=============  ===========================================  ==========================

All keys are EC P-384. Sites have no certificates: Flower authenticates them by their registered public keys.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.kit import Kit
from server.server_config import ServerConfig, dump_server_config
from server.state_folder import StateFolder, write_private

AUTHORITY_DAYS, CERTIFICATE_DAYS, KIT_DAYS = 3650, 397, 30
LOOPBACK = ("127.0.0.1", "localhost")
_BACKDATED = timedelta(hours=1)  # clocks of sites differ


@dataclass(frozen=True)
class Authority:
    """A key and the certificate that it signs others with."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new private key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_authority(federation: str, now: datetime) -> Authority:
    """Return a new authority that may sign certificates of servers and clients, and no other authority."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedtune {federation}"[:64])])
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )
    return Authority(key, certificate)


def issue(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    names: tuple[str, ...],
    now: datetime,
    *,
    client: bool = False,
    days: int = CERTIFICATE_DAYS,
) -> x509.Certificate:
    """Sign a certificate.

    Args:
        authority: who signs.
        key: whose certificate it is.
        names: host names and IP addresses (subjectAltName).
        now: when it begins, less an hour.
        client: for a client (clientAuth) in place of a server (serverAuth).
        days: how long it lasts.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    issuer_key = authority.key.public_key()
    return (
        _builder(subject, authority.certificate.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(authority.key, SHA384())
    )


def create_coordinator(path: Path, config: ServerConfig, now: datetime | None = None) -> StateFolder:
    """Make a state folder with authority, certificates, control key, executor secret and server config.

    Raises:
        ConfigError: if the folder is in use.
    """
    moment = now or datetime.now(UTC)
    state = StateFolder.create(path)
    authority = new_authority(config.federation, moment)
    write_private(state.ca_key, key_bytes(authority.key))
    write_private(state.ca_certificate, authority.certificate.public_bytes(Encoding.PEM))
    write_private(state.coordinator_key, key_bytes(new_key()))
    write_private(state.executor_secret, secrets.token_hex(32).encode())
    issue_certificates(state, config, authority, moment)
    write_private(state.config_file, dump_server_config(config).encode())  # last: with it the folder counts as made
    return state


def renew_certificates(state: StateFolder, now: datetime | None = None) -> None:
    """Issue all certificates anew, under new keys, with the host names of the server config."""
    issue_certificates(state, state.config(), load_authority(state), now or datetime.now(UTC))


def issue_certificates(state: StateFolder, config: ServerConfig, authority: Authority, now: datetime) -> None:
    """Write key and certificate of gateway, SuperLink, control service and operator."""
    for of, names in {
        "gateway": config.host_names, "superlink": LOOPBACK, "control": LOOPBACK, "operator": ("operator",),
    }.items():  # fmt: skip
        key = new_key()
        certificate = issue(authority, key.public_key(), names, now, client=of == "operator")
        for path, content in (
            (state.key(of), key_bytes(key)),
            (state.certificate(of), certificate.public_bytes(Encoding.PEM)),
        ):
            fresh = path.with_suffix(path.suffix + ".new")
            fresh.unlink(missing_ok=True)
            write_private(fresh, content)
            fresh.replace(path)


def load_authority(state: StateFolder) -> Authority:
    """Read the authority of a state folder."""
    certificate = x509.load_pem_x509_certificate(state.ca_certificate.read_bytes())
    return Authority(_load_key(state.ca_key), certificate)


def make_kit(state: StateFolder, site: str, now: datetime | None = None) -> Kit:
    """Return the signed kit of a site."""
    config, key = state.config(), _load_key(state.coordinator_key)
    last_day = ((now or datetime.now(UTC)) + timedelta(days=KIT_DAYS)).astimezone(UTC).date()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return Kit(
        federation=config.federation, site=site, address=config.address,
        ca_certificate=state.ca_certificate.read_text(encoding="ascii"), not_after=last_day, coordinator_key=public,
    ).sign(key)  # fmt: skip


def days_left(certificate: Path, now: datetime | None = None) -> float:
    """Return the days until a certificate ends; negative once it has."""
    end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    return (end - (now or datetime.now(UTC))) / timedelta(days=1)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no EC key; expected the one that fedtune-server init made. Restore it.")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
