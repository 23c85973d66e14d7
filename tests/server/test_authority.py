"""The coordinator's keys and certificates, and what is refused of them."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from common.errors import ConfigError
from server.authority import (
    create_coordinator,
    days_left,
    issue,
    load_authority,
    make_kit,
    new_authority,
    new_key,
    renew_certificates,
)
from server.server_config import ServerConfig, load_server_config
from server.state_folder import SOCKET_PATH_BYTES, StateFolder
from tests.server.coordinator import coordinator, server_config

NOW = datetime.now(UTC)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(leaf: x509.Certificate, authority: x509.Certificate, name: str, at: datetime = NOW) -> None:
    """Check a server's certificate as a library that is not ours does."""
    policy = PolicyBuilder().store(Store([authority])).time(at)
    policy.build_server_verifier(x509.DNSName(name)).verify(leaf, [])


def test_certificate_is_valid_for_its_names_and_its_time_alone() -> None:
    authority = new_authority("clinics", NOW)
    leaf = issue(authority, new_key().public_key(), ("fed.example.org",), NOW)
    verify(leaf, authority.certificate, "fed.example.org")
    with pytest.raises(VerificationError):
        verify(leaf, authority.certificate, "other.example.org")
    with pytest.raises(VerificationError):
        verify(leaf, authority.certificate, "fed.example.org", NOW + timedelta(days=398))
    with pytest.raises(VerificationError):
        verify(leaf, new_authority("clinics", NOW).certificate, "fed.example.org")


def test_certificates_serve_their_purpose_alone() -> None:
    with coordinator() as state:
        for of in ("gateway", "superlink", "control", "operator"):
            extensions = certificate(state.certificate(of)).extensions
            usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            wanted = ExtendedKeyUsageOID.CLIENT_AUTH if of == "operator" else ExtendedKeyUsageOID.SERVER_AUTH
            assert list(usage) == [wanted]
            assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_state_folder_and_every_private_file_are_the_owners_alone() -> None:
    with coordinator() as state:
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
        secret = [state.ca_key, state.coordinator_key, state.executor_secret, *state.tls.glob("*.key")]
        assert len(secret) == 7
        assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_renewed_certificates_take_the_names_of_the_config_and_keep_the_authority() -> None:
    with coordinator() as state:
        before, authority = certificate(state.certificate("gateway")), state.ca_certificate.read_bytes()
        text = state.config_file.read_text().replace("host_names:\n", "host_names:\n- fed.example.org\n")
        state.config_file.write_text(text)
        renew_certificates(state)
        after = certificate(state.certificate("gateway"))
        names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert "fed.example.org" in names.get_values_for_type(x509.DNSName)
        assert after.public_key() != before.public_key()
        assert state.ca_certificate.read_bytes() == authority
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(state.certificate("gateway"), state.key("gateway"))  # key and certificate match


def test_kit_is_signed_and_carries_nothing_secret() -> None:
    with coordinator() as state:
        kit = make_kit(state, "st-brigid", NOW)
        kit.verify(NOW)
        config = state.config()
        assert (kit.federation, kit.address, kit.site) == (config.federation, config.address, "st-brigid")
        assert x509.load_pem_x509_certificate(kit.ca_certificate.encode()) == load_authority(state).certificate
        kit.write(state.path / "kit.yaml")
        assert "PRIVATE" not in (state.path / "kit.yaml").read_text()
        with pytest.raises(ConfigError, match="not signed"):
            kit.model_copy(update={"address": "evil.example.org:8443"}).verify(NOW)


def test_state_folder_that_others_may_open_is_refused() -> None:
    with coordinator() as state:
        state.path.chmod(0o750)
        with pytest.raises(ConfigError, match="0700"):
            StateFolder.open(state.path)


def test_folder_in_use_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        create_coordinator(tmp_path, server_config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_path_too_long_for_a_socket_is_refused_and_the_longest_is_not(tmp_path: Path) -> None:
    room = SOCKET_PATH_BYTES - len(str(StateFolder(tmp_path / "x").socket("run"))) + 1
    assert len(str(StateFolder(tmp_path / ("x" * room)).socket("run"))) == SOCKET_PATH_BYTES
    with pytest.raises(ConfigError, match="unix sockets"):
        StateFolder.create(tmp_path / ("x" * (room + 1)))
    StateFolder.create(tmp_path / ("x" * room))


def test_certificate_tells_the_days_it_has_left() -> None:
    with coordinator() as state:
        path = state.certificate("gateway")
        assert days_left(path) == pytest.approx(397, abs=0.1)
        assert days_left(path, NOW + timedelta(days=400)) < 0


def test_server_config_reads_back_as_it_was_written() -> None:
    with coordinator(control_port=18777) as state:
        assert load_server_config(state.config_file) == state.config()
        assert state.config().control_port == 18777


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"address": "fed.example.org"}, "host:port"),
        ({"address": "fed.example.org:99999"}, "host:port"),
        ({"address": "other.example.org:8443"}, "host_names"),
        ({"port": 9000, "superlink_port": 9000}, "different"),
    ],
)
def test_server_config_that_cannot_work_is_refused(changes: dict[str, object], rule: str) -> None:
    known = server_config().model_dump()
    with pytest.raises(ValueError, match=rule):
        ServerConfig(**{**known, **changes})
