"""What is checked after a fault, on records, logs and ledgers that are right and wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from client.ledger.events import Charge, Committed, Reserved
from client.ledger.history import Entry
from client.places import Places
from common.errors import ConfigError
from server.run_place import RunPlace, Submission
from server.state_folder import StateFolder
from simulations.local_federation.faults.__main__ import FEDERATIONS, PAGE, plan
from simulations.local_federation.faults.checks import (
    SLACK_S,
    budget_is_right,
    closed_in_time,
    each_round_once,
    rounds_of,
    rounds_repeated,
    same_bits,
)
from simulations.local_federation.faults.kinds import FAULTS
from simulations.local_federation.faults.lines import append_line, read_lines, table
from simulations.local_federation.faults.trial import Trial
from simulations.results.page import write_tables

RUN, OTHER = "a" * 32, "b" * 32
TIME = "2026-01-01T00:00:00Z"


def entry(run: str, number: int, *, released: bool = True, steps: int = 3) -> Entry:
    charge = Charge(unit="example", noise_multiplier=1.0, sample_rate=0.5, steps=steps)
    reserved = Reserved(run=run, round=number, request="c" * 64, dataset=2, charge=charge, time=TIME)
    committed = Committed(run=run, round=number, payload="d" * 64, size_bytes=1, time=TIME)
    return Entry(reserved, committed if released else None)


@pytest.fixture
def place(tmp_path: Path) -> RunPlace:
    """A run of three rounds, in the second of which north was not there; Flower has two submissions of it."""
    (tmp_path / "runs").mkdir()
    place = RunPlace(StateFolder(tmp_path), "run")
    place.folder.create()
    place.write(Submission(name="run", config_yaml="", asked=TIME, flower_runs=(11, 12)))
    for number in (1, 2, 3):
        sites = {"north": "late" if number == 2 else "admitted", "south": "admitted"}
        told: dict[str, Any] = {site: {"status": status} for site, status in sites.items()}
        seconds = {"total": 40.0 if number == 2 else 2.0}
        place.folder.log({"kind": "round", "round": number, "sites": told, "seconds": seconds})
    return place


def ledger(*rounds: int, run: str = RUN) -> dict[tuple[str, int], Entry]:
    return {(run, number): entry(run, number) for number in rounds}


def test_budget_that_counts_each_round_once_is_right(place: RunPlace) -> None:
    before = ledger(1, 2, run=OTHER)
    assert rounds_of(place, "north") == {1, 3}
    assert budget_is_right(before, before | ledger(1, 3), place, "north", 3) == []
    assert budget_is_right(before, before | ledger(1, 2, 3), place, "north", 3) == []
    lost = before | ledger(1, 3) | {(RUN, 2): entry(RUN, 2, released=False)}
    assert budget_is_right(before, lost, place, "north", 3) == []


@pytest.mark.parametrize(
    ("after", "wrong"),
    [
        (ledger(1, 2, 3), "has changed"),  # a refund: what was spent before is gone
        (ledger(1, 2, run=OTHER) | ledger(1, 3) | ledger(2, run="e" * 32), "two ids"),
        (ledger(1, 2, run=OTHER) | ledger(1, 3, 4), "does not have"),
        (ledger(1, 2, run=OTHER) | ledger(1), "not released"),
        (ledger(1, 2, run=OTHER) | ledger(1) | {(RUN, 3): entry(RUN, 3, released=False)}, "not released"),
        (ledger(1, 2, run=OTHER) | ledger(1) | {(RUN, 3): entry(RUN, 3, steps=6)}, "differently"),
    ],
)
def test_budget_that_was_doubled_or_refunded_is_not(
    place: RunPlace, after: dict[tuple[str, int], Entry], wrong: str
) -> None:
    found = budget_is_right(ledger(1, 2, run=OTHER), after, place, "north", 3)
    assert any(wrong in one for one in found)


def test_rounds_asked_by_two_submissions_are_repeated(place: RunPlace, tmp_path: Path) -> None:
    sites = [Places.beside(tmp_path / name / "site.yaml") for name in ("north", "south")]
    for places in sites:
        places.log("supernode").parent.mkdir(parents=True)
    said = "\x1b[92mINFO \x1b[0m:      [RUN {}, ROUND {}]\n\x1b[92mINFO \x1b[0m:      {} message (ID: 5)\n"

    def log(site: int, *asked: tuple[int, int]) -> None:
        text = "".join(said.format(*one, "Receiving: train") + said.format(*one, "Sending: train") for one in asked)
        sites[site].log("supernode").write_text(said.format(11, "describe", "Receiving: query") + text)

    log(0, (11, 1), (11, 2), (12, 3))
    log(1, (11, 1), (11, 2), (12, 3))
    assert rounds_repeated(place, sites) == 0
    log(1, (11, 1), (12, 2), (12, 3))  # what the first submission asked, it did not live to hear
    assert rounds_repeated(place, sites) == 1
    log(1, (12, 1), (12, 2), (12, 3))
    assert rounds_repeated(place, sites) == 2
    log(1, (99, 1), (99, 2), (12, 3))  # another run's
    assert rounds_repeated(place, sites) == 0


def test_rounds_are_told_late_missing_and_twice(place: RunPlace) -> None:
    assert closed_in_time(place, 40.0)
    assert closed_in_time(place, 40.0 - SLACK_S)
    assert not closed_in_time(place, 39.0 - SLACK_S)
    assert closed_in_time(place, 39.0 - SLACK_S, first=3)
    assert each_round_once(place, 3)
    assert not each_round_once(place, 4)
    place.folder.log({"kind": "round", "round": 3})
    assert not each_round_once(place, 3)


def test_one_bit_of_an_adapter_is_a_difference() -> None:
    one = {"a": torch.ones(2)}
    assert same_bits(one, {"a": torch.ones(2)})
    assert not same_bits(one, {"a": torch.ones(2) * (1 + 2e-7)})
    assert not same_bits(one, {"a": torch.ones(2), "b": torch.ones(1)})


SOUND = Trial("gateway", "plain", None, 3.0, 1, "completed", 0, True, None, None, None, 20.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"ended": "failed"}, {"rounds_repeated": 2}, {"same_bits": False}, {"budgets": ["north: doubled"]},
        {"in_time": False}, {"rejoined": False},
    ],
)  # fmt: skip
def test_fault_with_any_harm_is_not_sound(changed: dict[str, Any]) -> None:
    assert SOUND.sound
    assert not Trial(**{**SOUND.__dict__, **changed}).sound


def test_plan_is_the_same_for_a_seed_and_has_every_kind_everywhere() -> None:
    assert plan(100, 0) == plan(100, 0)[:100]
    assert plan(100, 0)[:10] == plan(10, 0)
    assert plan(100, 0) != plan(100, 1)
    cells = {(one.kind, one.federation) for one in plan(2 * len(FAULTS), 0)}
    assert cells == {(kind, federation) for kind in FAULTS for federation in FEDERATIONS}


def test_lines_are_added_and_counted_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "faults.jsonl"
    assert read_lines(path) == []
    append_line(path, SOUND.line())
    append_line(path, Trial(**{**SOUND.__dict__, "rounds_repeated": 1, "same_bits": False}).line())
    assert [json.loads(text) for text in path.read_text().splitlines()] == read_lines(path)
    rows = table(read_lines(path)).splitlines()
    assert rows[2] == "| gateway | 2 | 2 of 2 | 1, 1, 0 | 1 of 2 | - | - | - | 20 |"
    assert rows[3].startswith("| **all** | 2 |")


def test_page_has_the_markers_of_the_table(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    command = "python -m simulations.local_federation.faults --write-docs"
    head, _, rest = PAGE.read_text().partition(f"<!-- faults: written by {command} -->")
    end = "<!-- end of faults -->"
    page.write_text(f"{head}<!-- faults: written by {command} -->\n{end}{rest.partition(end)[2]}")
    write_tables(page, {"faults": table([SOUND.line()]), "count": "1 faults"}, command)
    assert "| gateway | 1 |" in page.read_text()
    with pytest.raises(ConfigError, match="markers"):
        write_tables(page, {"other": ""}, command)
