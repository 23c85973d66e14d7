"""``fedtune-server watch | pause | resume | stop | set``: while a run goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import one_line_errors
from common.errors import ConfigError, RunError
from server.commands.options import DEFAULT_STATE, AsJson, Debug, RunName, State, Tcp, print_json, say

if TYPE_CHECKING:
    from pathlib import Path

    from server.control.client import ControlClient
    from server.run_place import RunPlace
    from server.state_folder import StateFolder

WAIT_POLL_S = 0.5


def watch(
    name: RunName,
    state: State = DEFAULT_STATE,
    tcp: Tcp = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Watch a run live until it is over; with --json a line at each change. Stays through restarts of its ServerApp."""
    with one_line_errors(debug):
        from rich.console import Console
        from rich.live import Live

        from server.commands.tables import view_table
        from server.run_place import find_run
        from server.run_view import run_view
        from server.state_folder import StateFolder

        folder = StateFolder.open(state)
        place = find_run(folder, name)
        with Live(console=Console(quiet=as_json), refresh_per_second=4) as live:
            shown: list[dict[str, Any]] = []

            def show(view: dict[str, Any]) -> None:
                if shown == [view]:
                    return
                shown[:] = [view]
                if as_json:
                    sys.stdout.write(json.dumps(view, ensure_ascii=False) + "\n")
                    sys.stdout.flush()
                else:
                    live.update(view_table(view))

            while not _watched(folder, place, tcp, show):
                show(run_view(folder, place, tcp=tcp))  # nobody works on it now: what its files say
                time.sleep(WAIT_POLL_S)
            show(run_view(folder, place))


def _watched(folder: StateFolder, place: RunPlace, tcp: bool, show: Callable[[dict[str, Any]], None]) -> bool:
    """Show a run for as long as a ServerApp works on it; return whether it is over."""
    from server.control.client import connected

    if place.submission().over:
        return True
    try:
        with connected(folder, place, folder.config(), tcp=tcp) as client:
            for view in client.watch():
                show(view)
    except RunError:
        pass  # nobody works on it now: the caretaker starts it, again or for the first time
    return place.submission().over


def pause(
    name: RunName, state: State = DEFAULT_STATE, tcp: Tcp = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Let no further round begin. The round in progress ends first."""
    _steer(name, state, tcp, as_json, debug, lambda client: client.pause(), "no further round begins.")


def resume(
    name: RunName, state: State = DEFAULT_STATE, tcp: Tcp = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Let a paused run go on."""
    _steer(name, state, tcp, as_json, debug, lambda client: client.resume(), "it goes on.")


def stop(
    name: RunName,
    after_round: Annotated[
        bool, typer.Option("--after-round", help="After the round in progress, and export the adapter.")
    ] = False,
    state: State = DEFAULT_STATE,
    tcp: Tcp = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """End a run: at once, its checkpoint kept, or after the round in progress."""
    with one_line_errors(debug):
        from server.run_place import find_run
        from server.run_view import run_line
        from server.state_folder import StateFolder

        folder = StateFolder.open(state)
        place = find_run(folder, name)
        if not place.submission().over:
            # Put down before the ServerApp is looked for and told: should it die before it acts, the caretaker gives
            # the run up, and one that begins only now finds the wish.
            if not (after_round and place.is_live()):
                place.stop_wish.touch()
            if not place.is_live():
                if as_json:
                    print_json(run_line(place))
                else:
                    say(f"run {name!r}: nobody works on it; it will not be submitted again.")
                return
        said = "it ends after the round in progress." if after_round else "it ends now."
        _steer(name, state, tcp, as_json, debug, lambda client: client.stop(after_round=after_round), said)


def set_(
    name: RunName,
    assignment: Annotated[
        str, typer.Argument(metavar="KEY=VALUE", help="sites_per_round or round_timeout_s; 'all' takes it back.")
    ],
    state: State = DEFAULT_STATE,
    tcp: Tcp = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Set what may change between rounds; it holds from the next round on."""
    with one_line_errors(debug):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is no assignment; expected KEY=VALUE.")
        said = f"{key.strip()} is {value.strip()} from the next round on."
        _steer(name, state, tcp, as_json, debug, lambda client: client.set(key.strip(), value.strip()), said)


def _steer(
    name: str, state: Path, tcp: bool, as_json: bool, debug: bool, call: Callable[[ControlClient], dict[str, Any]],
    said: str,
) -> None:  # fmt: skip
    with one_line_errors(debug):
        from server.control.client import connected
        from server.run_place import find_run
        from server.state_folder import StateFolder

        folder = StateFolder.open(state)
        with connected(folder, find_run(folder, name), folder.config(), tcp=tcp) as client:
            view = call(client)
        if as_json:
            print_json(view)
        else:
            say(f"run {name!r}: {said}")
