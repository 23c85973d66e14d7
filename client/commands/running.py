"""``up``, ``down``, ``status``, ``logs``, ``agent``: a site that runs."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.options import DEFAULT_SITE, AsJson, Debug, SiteConfigPath, say, show
from client.places import COMPONENTS, Places
from common.console import one_line_errors
from common.errors import ConfigError, RunError
from common.quiet import quiet_dependencies

if TYPE_CHECKING:
    from client.site_config import SiteConfig

_LINE = "%(asctime)s %(name)s %(message)s"


def up(site: SiteConfigPath = DEFAULT_SITE, debug: Debug = False) -> None:
    """Run the site in the foreground: agent, SuperNode and executor, each restarted for ever. Ctrl-C ends all three."""
    with one_line_errors(debug):
        from client.enrolment import enrolled
        from client.keys import read_key
        from client.site_config import load_site_config
        from client.supervise.components import components_of, free_port, write_files
        from client.supervise.running import only_one
        from client.supervise.supervisor import Supervisor
        from client.supervise.users import ONE_USER, are_separate, hand_over

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        places, own = Places.beside(site), load_site_config(site)
        kit = enrolled(places)
        read_key(places.private_key)
        with only_one(places):
            write_files(places, kit)
            if are_separate(own):
                hand_over(places, own)
            else:
                logging.getLogger(__name__).warning("%s", ONE_USER)
            supervisor = Supervisor(
                components_of(places, own, kit, own.runtime_port or free_port()), places.running
            )  # fmt: skip
            ended = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            supervisor.run(ended)
        say("ended.")


def agent(
    site: SiteConfigPath,
    socket: Annotated[Path | None, typer.Option(help="In place of the site config's.")] = None,
    debug: Debug = False,
) -> None:
    """Run the agent alone, in the foreground: what up and the systemd units start."""
    with one_line_errors(debug):
        quiet_dependencies()
        logging.basicConfig(level=logging.INFO, format=_LINE, stream=sys.stderr)
        from client.agent.server import serve
        from client.site_config import load_site_config

        serve(site.absolute(), socket or Places.beside(site).socket(load_site_config(site)))


def down(site: SiteConfigPath = DEFAULT_SITE, debug: Debug = False) -> None:
    """End what up runs, and wait for it."""
    with one_line_errors(debug):
        from client.supervise.running import end

        say("ended." if end(Places.beside(site)) else "nothing runs here.")


def status(
    site: SiteConfigPath = DEFAULT_SITE,
    socket: Annotated[Path | None, typer.Option(help="The agent's socket, in place of the site config's.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what runs, whether the coordinator answers, what the agent does and did last, what of the budget is spent.

    Exit status 1 unless all runs and the site is connected, also while it is connecting. What up did not start (systemd
    units) it cannot look at: there it asks the agent alone.
    """
    with one_line_errors(debug):
        quiet_dependencies()
        from client.site_config import load_site_config
        from client.site_tables import status_tables
        from client.supervise.connection import connection_of
        from client.supervise.running import what_runs

        places, own = Places.beside(site), load_site_config(site)
        running = what_runs(places)
        connection = connection_of(places, running)
        values: dict[str, Any] = {
            "site": own.name,
            "running": running,
            "connection": None if connection is None else asdict(connection),
            "agent": _agent(socket or places.socket(own)),
            "paused": own.policy.pause,
            "epsilon_spent": _spent(own),
            "budget": own.budget.model_dump(),
        }
        show(values, status_tables(values), as_json)
        up = all(part["pid"] is not None for part in (running or {}).get("components", {}).values())
        if values["agent"] is None or not up or (connection is not None and connection.state != "connected"):
            raise typer.Exit(1)


def _agent(socket: Path) -> dict[str, Any] | None:
    from client.agent.channel import status_of

    try:
        return status_of(socket)
    except RunError:
        return None


def _spent(own: SiteConfig) -> float | None:
    """The largest ε that a dataset in the ledger has spent; None where it cannot be read, or one cannot be counted."""
    from client.ledger.ledger import Ledger
    from client.ledger.report import largest_epsilon
    from common.errors import PrivacyError

    try:
        return largest_epsilon(Ledger(Path(own.ledger)).history(), own.budget)
    except PrivacyError:
        return None


def logs(
    component: Annotated[str, typer.Argument(help="agent, supernode or executor.")] = "agent",
    site: Annotated[Path, typer.Option("--site", help="Site config in YAML.")] = DEFAULT_SITE,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines of the end.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is added.")] = False,
    debug: Debug = False,
) -> None:
    """Print a component's log."""
    with one_line_errors(debug):
        if component not in COMPONENTS:
            raise ConfigError(f"component {component!r} is not known; expected one of {', '.join(COMPONENTS)}.")
        path = Places.beside(site).log(component)
        if not path.exists():
            raise RunError(f"{path} does not exist; expected the log of a site that ran. Start it: fedtune-client up.")
        with path.open(encoding="utf-8", errors="replace") as file:
            sys.stdout.writelines(deque(file, maxlen=lines))
            while follow:
                sys.stdout.write(file.read())
                sys.stdout.flush()
                time.sleep(0.5)
