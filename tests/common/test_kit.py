"""The kit: what is signed, what is refused, and that a file gives back what was written."""

from __future__ import annotations

import base64
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import ConfigError
from common.kit import LARGEST_BYTES, Kit, key_fingerprint, same_fingerprint
from tests.federation_keys import ec_key, public_pem, unsigned_kit


def test_kit_reads_back_as_it_was_written_and_signed(tmp_path: Path) -> None:
    kit = unsigned_kit(federation="föderation: 1", site="nörd #2").sign(ec_key("coordinator"))
    kit.write(tmp_path / "north.kit.yaml")
    read = Kit.read(tmp_path / "north.kit.yaml")
    assert read == kit
    read.verify()


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=128))
def test_signature_covers_any_name(name: str) -> None:
    kit = unsigned_kit(site=name).sign(ec_key("coordinator"))
    kit.verify()
    with pytest.raises(ConfigError, match="not signed"):
        kit.model_copy(update={"site": name + "x"}).verify()


def test_what_is_signed_is_canonical_json() -> None:
    kit = unsigned_kit(site="nörd")
    assert kit.signed_bytes().startswith(b'{"address":"localhost:8443","ca_certificate":"-----BEGIN')
    assert '"format":1,"not_after":"2200-01-01","site":"nörd"}'.encode() in kit.signed_bytes()


@pytest.mark.parametrize("key", sorted(set(Kit.model_fields) - {"format", "signature"}))
def test_no_key_of_a_signed_kit_can_be_changed(key: str) -> None:
    other = {
        "federation": "others", "site": "south", "address": "localhost:8444", "not_after": date(2201, 1, 1),
        "ca_certificate": unsigned_kit().ca_certificate + "\n", "coordinator_key": public_pem("other"),
    }  # fmt: skip
    kit = unsigned_kit().sign(ec_key("coordinator"))
    with pytest.raises(ConfigError, match="not signed by its coordinator_key"):
        kit.model_copy(update={key: other[key]}).verify()


OTHERS = base64.b64encode(ec_key("other").sign(b"", ec.ECDSA(hashes.SHA384()))).decode()


@pytest.mark.parametrize("signature", ["", "AAAA", OTHERS])
def test_kit_with_no_signature_of_the_key_is_refused(signature: str) -> None:
    with pytest.raises(ConfigError, match="not signed"):
        unsigned_kit(signature=signature).verify()


def test_kit_is_signed_by_the_key_it_names_only() -> None:
    with pytest.raises(ConfigError, match="names another coordinator_key"):
        unsigned_kit().sign(ec_key("other"))


def test_kit_ends_with_its_last_day() -> None:
    kit = unsigned_kit(not_after="2030-05-31").sign(ec_key("coordinator"))
    midnight = datetime(2030, 6, 1, tzinfo=UTC)
    kit.verify(midnight - timedelta(seconds=1))
    with pytest.raises(ConfigError, match="ended on 2030-05-31"):
        kit.verify(midnight)


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:0", "localhost:65536", "http://a:1", "a b:1", ":1", "-a:1"]
)
def test_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValidationError, match="address is no host:port"):
        unsigned_kit(address=address)


@pytest.mark.parametrize("address", ["gate.example.org:8443", "10.0.0.1:1", "[::1]:65535"])
def test_address_is_split_into_host_and_port(address: str) -> None:
    kit = unsigned_kit(address=address)
    assert address in (f"{kit.host}:{kit.port}", f"[{kit.host}]:{kit.port}")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ca_certificate": "no"}, "no certificate"), ({"coordinator_key": "no"}, "no key on the curve"),
        ({"signature": "?"}, "pattern"), ({"site": "a\nb"}, "not printable"), ({"more": 1}, "Extra"),
        ({"format": 2}, "Input should be 1"),
    ],
)  # fmt: skip
def test_kit_of_other_content_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        unsigned_kit(**changes)


def test_file_that_is_no_kit_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.kit.yaml"
    for content in (None, b"", b"\xff\xfe", b"a: 1\n", b"[1]\n", b"#" * (LARGEST_BYTES + 1)):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            Kit.read(path)
        assert "\n" not in str(caught.value)


def test_fingerprint_is_compared_however_it_was_written_down() -> None:
    shown = unsigned_kit().fingerprint()
    assert shown == key_fingerprint(ec_key("coordinator").public_key())
    assert same_fingerprint(shown, shown.replace(" ", ":").upper())
    assert not same_fingerprint(shown, shown[:-1] + ("0" if shown[-1] != "0" else "1"))
    assert not same_fingerprint("", "")
    assert not same_fingerprint(shown[:4], shown[:4])
