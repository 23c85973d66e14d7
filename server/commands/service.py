"""``fedtune-server up | down | status | systemd``: the coordinator's processes."""

from __future__ import annotations

import getpass
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import error_console, one_line_errors
from server.commands.options import DEFAULT_STATE, AsJson, Debug, State, print_json, say

FEW_DAYS = 30


def up(
    only: Annotated[
        list[str] | None, typer.Option(help="Run this component alone: superlink, executor, gateway, caretaker.")
    ] = None,
    state: State = DEFAULT_STATE,
    debug: Debug = False,
) -> None:
    """Run the coordinator in the foreground until Ctrl-C. Each process is started again by itself if it ends."""
    with one_line_errors(debug):
        from rich.logging import RichHandler

        from server.authority import days_left
        from server.state_folder import StateFolder
        from server.supervise.service import serve

        handler = RichHandler(console=error_console(), show_path=False, markup=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
        folder = StateFolder.open(state)
        config = folder.config()
        left = days_left(folder.certificate("gateway"))
        if left < FEW_DAYS:
            say(f"the gateway's certificate ends in {left:.0f} days; renew it with fedtune-server renew.")
        os.umask(0o077)

        def started() -> None:
            say(
                f"federation {config.federation!r}: sites connect to {config.address}; the gateway listens on "
                f"{config.listen}:{config.port}, the SuperLink on 127.0.0.1:{config.superlink_port}.",
                f"Logs are in {folder.logs}/. Ctrl-C ends it; runs go on from their checkpoints at the next start.",
            )

        serve(folder, only or (), started)


def down(state: State = DEFAULT_STATE, debug: Debug = False) -> None:
    """End the coordinator's processes. Runs go on from their last checkpoints at the next start."""
    with one_line_errors(debug):
        from server.state_folder import StateFolder
        from server.supervise.service import stop_service

        say("ended." if stop_service(StateFolder.open(state)) else "the coordinator was not up.")


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; without it, the coordinator.")] = None,
    tcp: Annotated[bool, typer.Option("--tcp", help="Ask the run over TCP.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say where the coordinator, or a run, stands."""
    with one_line_errors(debug):
        from server.state_folder import StateFolder

        folder = StateFolder.open(state)
        if run is not None:
            _run_status(folder, run, tcp=tcp, as_json=as_json)
            return
        known = coordinator_status(folder)
        if as_json:
            print_json(known)
            return
        from rich.console import Console
        from rich.table import Table

        from server.commands.tables import runs_table

        table = Table("component", "state", "process", "restarts", title=f"federation {known['federation']}")
        for name, part in known["components"].items():
            shown = "runs" if part["running"] else "is down"
            table.add_row(name, shown, str(part["pid"] or "-"), str(part["restarts"]))
        console = Console()
        console.print(table)
        if not known["up"]:
            say("The coordinator is not up here; fedtune-server up starts it (or see systemctl).")
        for what, answers in known["answers"].items():
            say(f"{what}: {'answers' if answers else 'does not answer'}")
        say(f"The certificates end in {known['certificate_days_left']:.0f} days.")
        console.print(runs_table(known["runs"]))


def coordinator_status(folder: Any) -> dict[str, Any]:
    """Return where the coordinator stands.

    Args:
        folder: the state folder.
    """
    from server.authority import days_left
    from server.enrolment import Enrolment
    from server.run_place import known_runs
    from server.run_view import run_line
    from server.supervise.service import component_states, listens, running_service

    config = folder.config()
    gateway_host = "127.0.0.1" if config.listen in ("0.0.0.0", "::") else config.listen  # noqa: S104
    return {
        "federation": config.federation,
        "up": running_service(folder) is not None,
        "components": component_states(folder),
        "answers": {
            f"SuperLink on 127.0.0.1:{config.superlink_port}": listens(config.superlink_port),
            f"gateway on {config.listen}:{config.port}": listens(config.port, gateway_host),
        },
        "certificate_days_left": days_left(folder.certificate("gateway")),
        "sites": len(Enrolment(folder).members()),
        "runs": [run_line(place) for place in known_runs(folder)],
    }


def _run_status(folder: Any, name: str, *, tcp: bool, as_json: bool) -> None:
    from rich.console import Console

    from server.commands.tables import view_table
    from server.run_place import find_run
    from server.run_view import run_view

    view = run_view(folder, find_run(folder, name), tcp=tcp)
    if as_json:
        print_json(view)
    else:
        Console().print(view_table(view))


def systemd(
    out: Annotated[Path, typer.Option(help="Folder to write the units into, such as /etc/systemd/system.")],
    user: Annotated[str | None, typer.Option(help="Who runs them; default: you.")] = None,
    state: State = DEFAULT_STATE,
    debug: Debug = False,
) -> None:
    """Write systemd units that keep each process alive in place of fedtune-server up."""
    with one_line_errors(debug):
        from server.state_folder import StateFolder
        from server.supervise.units import TARGET, write_units

        for path in write_units(StateFolder.open(state), user or getpass.getuser(), out):
            say(f"wrote {path}")
        say(f"Next:  systemctl daemon-reload && systemctl enable --now {TARGET}")
