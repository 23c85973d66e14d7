"""Enrolment: the coordinator's kit is checked, its key compared with what was told by telephone, and kept."""

from __future__ import annotations

from pathlib import Path

from client.places import Places
from client.site_config import SiteConfig
from common.errors import ConfigError
from common.kit import Kit, same_fingerprint


def check_kit(path: Path, site_config: SiteConfig, fingerprint: str | None) -> Kit:
    """Read a kit that is for this site, and signed by the key that was named.

    Args:
        path: of the kit.
        site_config: the site's.
        fingerprint: of the coordinator's key, as it was told; None where a person compares it.

    Raises:
        ConfigError: for a kit that is not signed, too old, for another site, or by another key.
    """
    kit = Kit.read(path)
    kit.verify()
    if kit.site != site_config.name:
        raise ConfigError(
            f"{path.name} is for site {kit.site!r}; expected {site_config.name!r}, which is name of the site config. "
            "Ask for this site's kit."
        )
    if fingerprint is not None and not same_fingerprint(fingerprint, kit.fingerprint()):
        raise ConfigError(
            f"{path.name} is signed by the key {kit.fingerprint()}; expected {fingerprint}. Do not enrol: somebody "
            "else may have made it."
        )
    return kit


def keep_kit(kit: Kit, places: Places) -> None:
    """Keep a kit that was checked; an earlier one is replaced if the same coordinator signed it.

    Raises:
        ConfigError: if another coordinator's kit stands there.
    """
    if places.kit.exists():
        before = Kit.read(places.kit)
        if before.fingerprint() != kit.fingerprint():
            raise ConfigError(
                f"{places.kit} is of another coordinator ({before.fingerprint()}); expected {kit.fingerprint()}. Move "
                "it away to join another federation."
            )
    kit.write(places.kit)


def enrolled(places: Places) -> Kit:
    """Return the kit that the site was enrolled with. Its last day was for enrolling, and may be over.

    Raises:
        ConfigError: if there is none.
    """
    if not places.kit.exists():
        raise ConfigError(
            f"{places.kit} does not exist; expected the coordinator's kit. Take it in: fedtune-client enroll KIT "
            f"--site {places.site_config.name}."
        )
    return Kit.read(places.kit)
