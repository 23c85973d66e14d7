"""All checks of a site, in the order in which a person would put things right."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from client.checks.finding import Finding, finding_of
from client.checks.gateway import check_connection, check_kit
from client.checks.trial import Trial, trial_run
from client.keys import read_key
from client.ledger.spending import epsilon_of
from client.places import Places
from client.policy.section import Policy
from client.site import read_site_rows
from client.site_config import SiteConfig
from client.supervise.connection import connection_of
from client.supervise.running import what_runs
from common.config.run import RunConfig
from common.errors import FedtuneError
from common.kit import key_fingerprint

_AT_COORDINATOR = "key at the coordinator"


def check_site(places: Places, site_config: SiteConfig, config: RunConfig | None) -> Iterator[Finding]:
    """Yield what each check finds, as it is done.

    Args:
        places: where the site's files are.
        site_config: the site's.
        config: a run config to try, or None for a step that fedtune makes up.
    """
    yield finding_of("data", lambda: _data(site_config, config))
    yield finding_of("ledger", lambda: _ledger(site_config, config))
    units = _units(site_config)
    if units is not None:
        trial = Trial(site_config, config or trial_run(site_config, units), own=config is None)
        for what, look in (("base model", trial.model), ("device", trial.device)):
            yield finding_of(what, look)
        yield finding_of("self-test", trial.self_test)
        yield finding_of("dry step", trial.step)
    yield finding_of("key", lambda: _key(places))
    yield finding_of("kit", lambda: check_kit(places))
    yield finding_of("TLS to the gateway", lambda: check_connection(places))
    yield finding_of(_AT_COORDINATOR, lambda: _registered(places))


def _data(site_config: SiteConfig, config: RunConfig | None) -> Finding:
    read = read_site_rows(*_for_reading(site_config, config))
    persons = f", {len(set(read.persons))} persons" if read.persons is not None else ""
    found = f"{len(read.examples)} rows{persons}"
    mode = Path(site_config.data).stat().st_mode
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return Finding("data", "note", f"{found}, open to others ({mode & 0o777:o})", "chmod 600, or say why not.")
    return Finding("data", "pass", found)


def _ledger(site_config: SiteConfig, config: RunConfig | None) -> str:
    read = read_site_rows(*_for_reading(site_config, config))
    read.ledger.expect_delta()
    events, _ = read.ledger.ledger.verify()
    spent = epsilon_of(read.ledger.ledger.charges(read.ledger.dataset), site_config.budget)
    return f"{events} events, chain unbroken, ε {spent:.2f} of {site_config.budget.epsilon:g} spent"


def _for_reading(site_config: SiteConfig, config: RunConfig | None) -> tuple[RunConfig, SiteConfig]:
    """A run config that reads the rows as they are; the policy has no say in one of ours."""
    if config is not None:
        return config, site_config
    return trial_run(site_config, 1000), site_config.model_copy(update={"policy": Policy()})


def _units(site_config: SiteConfig) -> int | None:
    """The site's records or persons; None where its rows cannot be read, which a check has said by then."""
    try:
        return read_site_rows(*_for_reading(site_config, None)).num_units(site_config.budget.unit) or None
    except FedtuneError:
        return None


def _key(places: Places) -> str:
    return f"fingerprint {key_fingerprint(read_key(places.private_key).public_key())}"


def _registered(places: Places) -> Finding:
    """Whether the coordinator knows the key: only a SuperNode that runs can tell, since Flower has no harmless call."""
    what, connection = _AT_COORDINATOR, connection_of(places, what_runs(places))
    if connection is None:
        return Finding(what, "note", "not known before the site runs", "fedtune-client up, then fedtune-client status.")
    found = f"{connection.state}: {connection.said}"
    if connection.state == "connected":
        return Finding(what, "pass", found)
    if connection.state == "connecting":
        return Finding(what, "note", found, "Ask fedtune-client status in half a minute.")
    remedy = (
        "Where TLS passes: fedtune-client logs supernode. Where the coordinator does not activate it, send "
        f"{places.public_key} to be enrolled under the site's name; else ask there whether all is up."
    )
    return Finding(what, "fail", found, remedy)
