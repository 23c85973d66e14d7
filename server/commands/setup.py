"""``fedtune-server init | renew | sites ...``: the coordinator's keys, and who may connect."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import one_line_errors
from common.errors import ConfigError, RunError
from server.commands.options import DEFAULT_STATE, AsJson, Debug, State, print_json, say

if TYPE_CHECKING:
    from server.enrolment import Enrolment, Site
    from server.state_folder import StateFolder

SETTLE_S = 30.0
"""Longest that a command waits for the SuperLink to know of a change."""

SiteArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the site in the federation.")]


def init(
    federation: Annotated[str, typer.Option(help="Name of the federation.")],
    address: Annotated[str, typer.Option(help="host:port of the gateway, as sites reach it.")],
    host_names: Annotated[
        list[str] | None, typer.Option("--host-name", help="A further name or address of it; repeatable.")
    ] = None,
    listen: Annotated[str, typer.Option(help="Address that the gateway binds to.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[int | None, typer.Option(help="Port that it binds to; default: the one of --address.")] = None,
    superlink_port: Annotated[int, typer.Option(help="Loopback port of the SuperLink.")] = 8000,
    control_port: Annotated[int | None, typer.Option(help="Loopback port of the control service over TCP.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    state: State = DEFAULT_STATE,
    debug: Debug = False,
) -> None:
    """Make the state folder: certificate authority, certificates, keys and server.yaml."""
    with one_line_errors(debug):
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        from common.config.load import validate_section
        from common.config.yaml_text import Document
        from common.kit import key_fingerprint
        from server.authority import create_coordinator
        from server.server_config import ServerConfig

        host, _, public_port = address.rpartition(":")
        names = list(dict.fromkeys([host.strip("[]"), *(host_names or ())]))
        values = {
            "federation": federation, "address": address, "host_names": names, "listen": listen,
            "port": port if port is not None else int(public_port) if public_port.isdigit() else public_port,
            "superlink_port": superlink_port, "control_port": control_port, "device": device,
        }  # fmt: skip
        made = create_coordinator(state, validate_section(ServerConfig, Document("the options", values)))
        key = load_pem_private_key(made.coordinator_key.read_bytes(), password=None)
        say(
            f"made {state}/ for the federation {federation!r}; keep it, and keep it to yourself: it holds all keys.",
            f"Fingerprint of the coordinator's key, to be compared by telephone with each site: "
            f"{key_fingerprint(key.public_key())}",  # type: ignore[arg-type]
            f"Next:  fedtune-server sites add NAME site.pub --state {state}",
        )


def renew(state: State = DEFAULT_STATE, debug: Debug = False) -> None:
    """Issue the certificates anew, with the host names of server.yaml; the authority, and so all kits, stay."""
    with one_line_errors(debug):
        from server.authority import renew_certificates
        from server.state_folder import StateFolder

        renew_certificates(StateFolder.open(state))
        say("issued new certificates. They are used from the next start: fedtune-server down, then up.")


sites = typer.Typer(help="Who may connect: add, list, revoke, kit.", no_args_is_help=True)


@sites.command("add")
def sites_add(
    name: SiteArgument,
    public_key: Annotated[Path, typer.Argument(metavar="SITE_PUB", help="site.pub, which the site sent.")],
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Enrol a site by its public key. Compare the fingerprint that is printed with the site's, by telephone."""
    with one_line_errors(debug):
        folder, enrolment = _opened(state)
        try:
            text = public_key.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{public_key} cannot be read; expected the site.pub of the site.") from None
        added = enrolment.add(name, text)
        known = _settled(folder, enrolment, added)
        if as_json:
            print_json(_shown(known))
            return
        say(
            f"enrolled {name!r}, key {known.fingerprint}",
            "It may connect now." if known.settled else "It may connect once the coordinator is up.",
            f"Next:  fedtune-server sites kit {shlex.quote(name)} --state {state}",
        )


@sites.command("list")
def sites_list(state: State = DEFAULT_STATE, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the enrolled sites, revoked ones too, and whether they are connected."""
    with one_line_errors(debug):
        from rich.console import Console
        from rich.table import Table

        folder, enrolment = _opened(state)
        known = enrolment.sites()
        connected = _connected(folder) if known else {}
        rows = [_shown(site) | {"connection": connected.get(site.node_id or 0)} for site in known]
        if as_json:
            print_json(rows)
            return
        table = Table("site", "key", "added", "state", "connection")
        for row in rows:
            table.add_row(row["name"], row["fingerprint"], row["added"], row["state"], row["connection"] or "-")
        Console().print(table)


@sites.command("revoke")
def sites_revoke(
    name: SiteArgument, state: State = DEFAULT_STATE, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Turn a site away, at once where the coordinator is up. Its key is never taken again."""
    with one_line_errors(debug):
        folder, enrolment = _opened(state)
        known = _settled(folder, enrolment, enrolment.revoke(name))
        if as_json:
            print_json(_shown(known))
        else:
            say(f"revoked {name!r}: " + ("turned away." if known.settled else "turned away at the next start."))


@sites.command("kit")
def sites_kit(
    name: SiteArgument,
    out: Annotated[Path | None, typer.Option(help="File to write; default: NAME.kit.yaml.")] = None,
    state: State = DEFAULT_STATE,
    debug: Debug = False,
) -> None:
    """Write the signed kit of a site, which the site enrols with fedtune-client. It holds nothing secret."""
    with one_line_errors(debug):
        from server.authority import make_kit

        folder, enrolment = _opened(state)
        kit = make_kit(folder, enrolment.get(name).name)
        path = Path(f"{name}.kit.yaml") if out is None else out
        kit.write(path)
        say(
            f"wrote {path}: to be enrolled until {kit.not_after}.",
            f"Fingerprint of the coordinator's key, to be compared by telephone: {kit.fingerprint()}",
        )


def _opened(state: Path) -> tuple[StateFolder, Enrolment]:
    from server.enrolment import Enrolment
    from server.state_folder import StateFolder

    folder = StateFolder.open(state)
    return folder, Enrolment(folder)


def _settled(folder: StateFolder, enrolment: Enrolment, site: Site) -> Site:
    """Wait until the SuperLink knows of a change, if it is up, and return the site as it is then."""
    from server.supervise.service import listens

    deadline = time.monotonic() + SETTLE_S
    while True:
        known = next(other for other in enrolment.sites() if other.public_key == site.public_key)
        if known.settled or time.monotonic() > deadline or not listens(folder.config().superlink_port):
            return known
        time.sleep(0.2)


def _connected(folder: StateFolder) -> dict[int, str]:
    from server.flower_commands import Flower
    from server.supervise.service import listens

    port = folder.config().superlink_port
    try:
        return Flower(folder, port).nodes() if listens(port) else {}
    except RunError:
        return {}


def _shown(site: Site) -> dict[str, str | None]:
    return {
        "name": site.name, "fingerprint": site.fingerprint, "added": site.added, "revoked": site.revoked,
        "node_id": None if site.node_id is None else str(site.node_id),
        "state": "revoked" if site.revoked else "enrolled" if site.settled else "waits for the coordinator",
    }  # fmt: skip
