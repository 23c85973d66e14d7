"""The checks of a site as a whole: what passes, what fails with which remedy, and that nothing is charged."""

from __future__ import annotations

from collections.abc import Callable

from client.checks.finding import Finding
from client.checks.site import check_site
from client.places import Places
from client.site_config import load_site_config
from common.config.run import RunConfig
from tests.client.real_sites import RealSite
from tests.conftest import write_rows

MakeSite = Callable[..., RealSite]


def checked(site: RealSite, config: RunConfig | None = None) -> dict[str, Finding]:
    found = list(check_site(Places.beside(site.path), load_site_config(site.path), config))
    assert all(finding.remedy for finding in found if finding.outcome != "pass"), found
    return {finding.what: finding for finding in found}


def test_site_that_is_not_enrolled_passes_all_but_the_way_to_the_coordinator(make_site: MakeSite) -> None:
    site = make_site()
    site.data.chmod(0o600)
    site.write(policy={"base_models": [{"sha256": site.model.base.fingerprint}]})
    files = {path: path.read_bytes() for path in site.path.parent.rglob("*") if path.is_file()}
    found = checked(site)
    outcomes = {what: finding.outcome for what, finding in found.items()}
    assert outcomes.pop("device") in ("pass", "note")
    assert outcomes == {
        "data": "pass", "ledger": "pass", "base model": "pass", "self-test": "pass", "dry step": "pass",
        "key": "fail", "kit": "fail", "TLS to the gateway": "fail", "key at the coordinator": "note",
    }  # fmt: skip
    assert site.model.base.fingerprint in found["base model"].found
    assert "24 rows, 8 persons" in found["data"].found
    assert not site.ledger.history().entries
    assert {path: path.read_bytes() for path in site.path.parent.rglob("*") if path.is_file()} == files


def test_what_is_wrong_is_named_with_its_remedy(make_site: MakeSite) -> None:
    site = make_site()
    site.ledger.path.unlink()
    site.write(policy={"base_models": [{"sha256": "0" * 64}]})
    found = checked(site)
    assert (found["ledger"].outcome, "does not exist" in found["ledger"].found) == ("fail", True)
    assert (found["base model"].outcome, "policy.base_models" in found["base model"].remedy) == ("fail", True)
    write_rows(site.data, [row | {"label": "odd"} if index == 4 else row for index, row in enumerate(site.rows)])
    found = checked(site)
    assert found["data"].outcome == "fail"
    assert "line 5" in found["data"].found
    assert "dry step" not in found


def test_run_is_tried_by_the_sites_policy(make_site: MakeSite) -> None:
    site = make_site()
    assert checked(site, site.config)["dry step"].outcome == "pass"
    site.write(policy={"largest_rounds": 1})
    found = checked(site, site.config)
    assert {found[what].outcome for what in ("data", "base model", "self-test", "dry step")} == {"fail"}
    assert "federation.rounds of the run is 2" in found["data"].found
