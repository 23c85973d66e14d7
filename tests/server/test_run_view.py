"""What an operator is shown of a run that nobody works on: bytes as they passed, late answers included."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from common.run_folder import RunFolder
from server.commands.tables import rounds_table
from server.late import Carried
from server.outcome import Outcome
from server.run_place import ask_for_run
from server.run_view import round_lines, run_view
from server.state_folder import StateFolder
from tests.server.run_configs import run_config


def log_rounds(folder: RunFolder) -> None:
    """Two rounds: site two answers the first one's request in the second."""
    folder.create()
    seconds = {"total": 1.0, "training": 0.5, "aggregation": 0.5}
    first = {"one": Outcome("admitted", bytes_down=1000, bytes_up=200), "two": Outcome("late", bytes_down=1000)}
    second = {"one": Outcome("admitted", bytes_down=1000, bytes_up=200)}
    owed = Carried("two", 1, 1, Outcome("admitted", bytes_up=7000))
    for number, outcomes, carried in ((1, first, []), (2, second, [owed.as_dict()])):
        sites = {site: asdict(outcome) for site, outcome in outcomes.items()}
        folder.log({"kind": "round", "round": number, "sites": sites, "carried": carried, "seconds": seconds})


def test_late_answers_are_among_the_bytes_shown(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    place = ask_for_run(state, run_config())
    log_rounds(place.folder)
    view = run_view(state, place)
    assert (view["bytes_up"], view["bytes_down"]) == (200 + 200 + 7000, 3 * 1000)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(rounds_table(round_lines(place)))
    rows = [line for line in shown.get().splitlines() if " 1.0 " in line]
    assert ["200 B" in rows[0], "7.2 kB" in rows[1]] == [True, True]
