"""``fedtune-server run | runs | rounds | export | logs``: from a run config to an adapter."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import one_line_errors
from common.errors import ConfigError, RunError
from server.commands.options import DEFAULT_STATE, AsJson, Debug, RunName, State, print_json, say

SUBMIT_S = 60.0


def run(
    config: Annotated[Path, typer.Argument(help="Run config in YAML; configs/ has some that work.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or failed.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Submit a run. It begins when the coordinator is up and enough sites are there."""
    with one_line_errors(debug):
        from common.config.load import load_run_config
        from server.run_place import ask_for_run
        from server.run_view import run_line
        from server.state_folder import StateFolder

        folder = StateFolder.open(state)
        wanted = load_run_config(config, overrides or ())
        place = ask_for_run(folder, wanted, again=resume)
        before = place.submission().fence
        deadline = time.monotonic() + SUBMIT_S
        while _is_up(folder) and time.monotonic() < deadline:
            known = place.submission()
            if known.over or (known.fence > before and known.state != "submitting"):
                break
            time.sleep(0.2)
        line = run_line(place)
        if as_json:
            print_json(line)
            return
        if line["state"] == "waiting":
            say(f"run {place.name!r} waits for the coordinator: fedtune-server up --state {state}")
        else:
            say(f"run {place.name!r} is {line['state']}.", f"Next:  fedtune-server watch {place.name} --state {state}")


def _is_up(folder: Any) -> bool:
    from server.supervise.service import listens

    return listens(folder.config().superlink_port)


def runs(state: State = DEFAULT_STATE, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the runs."""
    with one_line_errors(debug):
        from rich.console import Console

        from server.commands.tables import runs_table
        from server.run_place import known_runs
        from server.run_view import run_line
        from server.state_folder import StateFolder

        lines = [run_line(place) for place in known_runs(StateFolder.open(state))]
        if as_json:
            print_json(lines)
        else:
            Console().print(runs_table(lines))


def rounds(name: RunName, state: State = DEFAULT_STATE, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the complete rounds of a run: who was admitted, who was lost and why, metrics, bytes, seconds."""
    with one_line_errors(debug):
        from rich.console import Console

        from server.commands.tables import rounds_table
        from server.run_place import find_run
        from server.run_view import round_lines
        from server.state_folder import StateFolder

        lines = round_lines(find_run(StateFolder.open(state), name))
        if as_json:
            print_json(lines)
        else:
            Console().print(rounds_table(lines))


def export(
    name: RunName,
    to: Annotated[Path, typer.Option(help="Folder to write; new.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Also fold the adapter into its base model, in merged/.")
    ] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy what a run that is over has left: adapter, model card, summary, metrics and config."""
    with one_line_errors(debug):
        from server.run_place import find_run
        from server.run_view import expect_adapter
        from server.state_folder import StateFolder

        place = find_run(StateFolder.open(state), name)
        expect_adapter(place)
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise ConfigError(f"{to} exists and is not empty; expected a new folder. Choose another.")
        to.mkdir(parents=True, exist_ok=True)
        folder = place.folder
        shutil.copytree(folder.adapter, to / "adapter")
        written = ["adapter"]
        for file in (folder.model_card, folder.summary, folder.metrics, folder.config):
            shutil.copyfile(file, to / file.name)
            written.append(file.name)
        if merge:
            from common.models.folder import model_folder
            from common.models.merge import merge_adapter
            from common.quiet import quiet_dependencies

            quiet_dependencies()
            source = model_folder(place.submission().config().model)
            merge_adapter(to / "adapter", source, to / "merged", "cpu")
            written.append("merged")
        if as_json:
            print_json({"run": name, "folder": str(to), "files": written})
        else:
            say(f"wrote {to}/: {', '.join(written)}")


def logs(
    of: Annotated[
        str, typer.Argument(metavar="RUN_OR_COMPONENT", help="A run, or superlink, executor, gateway, caretaker.")
    ],
    lines: Annotated[int, typer.Option(min=1, help="Last lines to print.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing until Ctrl-C.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the log of a run's ServerApp, or of a component."""
    with one_line_errors(debug):
        from server.run_place import find_run
        from server.state_folder import StateFolder
        from server.supervise.components import coordinator_components

        folder = StateFolder.open(state)
        components = coordinator_components(folder, folder.config())
        path = folder.log(of) if of in components else find_run(folder, of).log
        if not path.exists():
            raise RunError(f"{of} has no log yet; expected one once it has started.")
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        if as_json:
            print_json(text)
            return
        say(*text)
        if follow:
            _follow(path)


def _follow(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            fresh = file.read()
            if fresh:
                say(fresh.rstrip("\n"))
            time.sleep(0.5)
