"""A site's key, what init writes, and which kits it takes in."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.keys import make_key, read_key
from client.ledger.ledger import Ledger
from client.places import Places
from client.site_config import load_site_config
from common.errors import ConfigError
from common.kit import Kit, key_fingerprint
from tests.client.test_cli import call
from tests.conftest import label_rows, write_rows
from tests.federation_keys import ec_key, public_pem, unsigned_kit


def init(folder: Path, base: Path, *more: object) -> tuple[int, str, str]:
    data = write_rows(folder / "own.jsonl", label_rows(24))
    return call(
        "init", folder / "north", "--name", "north", "--data", data, "--task", "classification",
        "--labels", "heart,skin,bones", "--model", base, "--epsilon", "8", *more,
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    status, _, error = init(tmp_path, tiny_models["bert"])
    assert status == 0, error
    return tmp_path / "north" / "site.yaml"


def test_init_writes_a_site_config_a_key_and_a_ledger_and_says_what_to_send(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    status, shown, _ = init(tmp_path, tiny_models["bert"], "--max-rank", 4, "--person-field", "patient")
    assert status == 0
    own = load_site_config(tmp_path / "north" / "site.yaml")
    assert (own.name, own.rows.labels, own.budget.epsilon, own.budget.unit) == (
        "north", ("heart", "skin", "bones"), 8.0, "user",
    )  # fmt: skip
    assert (own.max_rank, own.person_field, own.policy.metrics) == (4, "patient", ())
    assert (len(own.policy.base_models), own.policy.largest_rank) == (1, 256)
    Ledger(Path(own.ledger)).expect_ready()
    places = Places.beside(tmp_path / "north" / "site.yaml")
    assert str(places.public_key) in shown
    assert key_fingerprint(read_key(places.private_key).public_key()) in shown
    assert "PRIVATE KEY" not in shown


def test_init_asks_for_what_no_flag_gives(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from typer.testing import CliRunner

    from client.cli import app

    data = write_rows(tmp_path / "own.jsonl", label_rows(24))
    answers = ["north 1: west", str(data), "classification", "heart, skin", str(tiny_models["bert"]), "2.5"]
    result = CliRunner().invoke(app, ["init", str(tmp_path / "n")], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    own = load_site_config(tmp_path / "n" / "site.yaml")
    assert (own.name, own.rows.labels, own.budget.epsilon) == ("north 1: west", ("heart", "skin"), 2.5)


def test_init_leaves_a_site_that_is_there_alone(site: Path, tiny_models: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in site.parent.rglob("*") if path.is_file()}
    status, _, error = init(site.parent.parent, tiny_models["bert"])
    assert (status, error.count("\n")) == (2, 1)
    assert "exists; expected a folder without a site" in error
    assert {path: path.read_bytes() for path in site.parent.rglob("*") if path.is_file()} == before


def test_key_is_on_the_curve_in_the_form_that_flower_reads_and_closed(site: Path) -> None:
    places = Places.beside(site)
    private = load_ssh_private_key(places.private_key.read_bytes(), None)
    public = load_ssh_public_key(places.public_key.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(public.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert stat.S_IMODE(places.private_key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="exists; expected a site without a key"):
        make_key(places)


def test_key_that_others_can_read_is_refused(site: Path) -> None:
    places = Places.beside(site)
    places.private_key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"open to others \(640\)"):
        read_key(places.private_key)
    places.private_key.chmod(0o600)
    places.private_key.write_text("no key")
    with pytest.raises(ConfigError, match="no EC key"):
        read_key(places.private_key)


def kit_file(folder: Path, signer: str = "coordinator", **changes: Any) -> Path:
    path = folder / "north.kit.yaml"
    unsigned_kit(coordinator_key=public_pem(signer), **changes).sign(ec_key(signer)).write(path)
    return path


def test_kit_is_taken_in_once_its_fingerprint_is_confirmed(site: Path, tmp_path: Path) -> None:
    kit = kit_file(tmp_path)
    fingerprint = Kit.read(kit).fingerprint()
    status, shown, _ = call("enroll", kit, "--site", site, "--fingerprint", fingerprint.replace(" ", "").upper())
    assert status == 0
    assert fingerprint in shown
    assert Kit.read(Places.beside(site).kit) == Kit.read(kit)


@pytest.mark.parametrize(
    ("changes", "arguments", "what"),
    [
        ({}, ["--fingerprint", "0" * 40], "somebody else may have made it"),
        ({"site": "south"}, [], "is for site 'south'"),
        ({"not_after": "2020-01-01"}, [], "ended on 2020-01-01"),
        ({}, [], "Aborted"),
    ],
)
def test_kit_that_is_not_for_this_site_is_not_taken_in(
    site: Path, tmp_path: Path, changes: dict[str, Any], arguments: list[str], what: str
) -> None:
    status, _, error = call("enroll", kit_file(tmp_path, **changes), "--site", site, *arguments)
    assert status != 0
    assert what in error
    assert not Places.beside(site).kit.exists()


def test_changed_kit_is_not_taken_in(site: Path, tmp_path: Path) -> None:
    kit = kit_file(tmp_path)
    kit.write_text(kit.read_text().replace("localhost:8443", "elsewhere:8443"))
    status, _, error = call("enroll", kit, "--site", site)
    assert status == 2
    assert "not signed by its coordinator_key" in error


def test_kit_of_another_coordinator_does_not_replace_the_first(site: Path, tmp_path: Path) -> None:
    first, fingerprint = kit_file(tmp_path), Kit.read(kit_file(tmp_path)).fingerprint()
    assert call("enroll", first, "--site", site, "--fingerprint", fingerprint)[0] == 0
    other = kit_file(tmp_path, "another coordinator")
    status, _, error = call("enroll", other, "--site", site, "--fingerprint", Kit.read(other).fingerprint())
    assert status == 2
    assert "is of another coordinator" in error
    assert Kit.read(Places.beside(site).kit).fingerprint() == fingerprint


def test_policy_show_prints_every_rule(site: Path) -> None:
    from client.policy.section import Policy

    status, shown, _ = call("policy", "show", site)
    assert status == 0
    assert all(f"policy.{key}" in shown for key in Policy.model_fields)


def test_systemd_units_are_taken_by_systemd(site: Path, tmp_path: Path) -> None:
    import shutil

    kit = kit_file(tmp_path)
    call("enroll", kit, "--site", site, "--fingerprint", Kit.read(kit).fingerprint())
    status, shown, error = call("systemd", site, "--name", "north", "--out", tmp_path / "units")
    assert status == 0, error
    units = sorted((tmp_path / "units").iterdir())
    assert [unit.name for unit in units] == [
        f"fedtune-north-{part}.service" for part in ("agent", "executor", "supernode")
    ]  # fmt: skip
    users = {line for unit in units for line in unit.read_text().splitlines() if line.startswith("User=")}
    assert len(users) == 3
    assert "useradd" in shown
    executor = next(unit for unit in units if "executor" in unit.name).read_text()
    own = load_site_config(site)
    assert f'InaccessiblePaths="-{own.data}"' in executor
    assert "site.key" not in executor
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    said = [line for line in checked.stderr.splitlines() if "fedtune-north" in line]
    assert not said, checked.stderr
