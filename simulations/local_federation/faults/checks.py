"""What must hold of a run whose processes were killed, read off what coordinator and sites have written."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from client.ledger.history import Entry
from client.ledger.ledger import Ledger
from client.places import Places
from client.site_config import load_site_config
from server.run_place import RunPlace

SLACK_S = 10.0
"""Seconds from a round's deadline to its record: the last look for replies, and aggregation."""
_ASKED = re.compile(r"\[RUN (\d+), ROUND (\d+)\][^\n]*\n[^\n]*Receiving: train message")

Entries = dict[tuple[str, int], Entry]
"""What a ledger holds, by the run's id and the round."""


def rounds_repeated(place: RunPlace, sites: Iterable[Places]) -> int:
    """Return how many rounds of a run were begun again: asked of a site by more than one submission of the run."""
    ours = set(place.submission().flower_runs)
    submissions: dict[int, set[int]] = defaultdict(set)
    for places in sites:
        for run, number in _ASKED.findall(places.log("supernode").read_text(encoding="utf-8", errors="replace")):
            if int(run) in ours:
                submissions[int(number)].add(int(run))
    return sum(len(each) - 1 for each in submissions.values())


def each_round_once(place: RunPlace, rounds: int) -> bool:
    """Whether the run's record has every round, each once and in order."""
    return [record["round"] for record in place.folder.iterate_records("round")] == list(range(1, rounds + 1))


def adapter_of(place: RunPlace) -> dict[str, torch.Tensor]:
    """Return the trained adapter."""
    return load_file(place.folder.adapter / "adapter_model.safetensors")


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two adapters are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def closed_in_time(place: RunPlace, deadline_s: float, first: int = 1) -> bool:
    """Whether every round of a run, from the ``first`` on, was closed by its deadline."""
    records = (record for record in place.folder.iterate_records("round") if record["round"] >= first)
    return all(record["seconds"]["total"] <= deadline_s + SLACK_S for record in records)


def rounds_of(place: RunPlace, site: str) -> set[int]:
    """Return the rounds whose update of a site counted."""
    records = place.folder.iterate_records("round")
    return {r["round"] for r in records if r["sites"].get(site, {}).get("status") == "admitted"}


def entries_of(places: Places) -> Entries:
    """Return what a site's ledger holds, its chain verified."""
    ledger = Ledger(Path(load_site_config(places.site_config).ledger))
    ledger.verify()
    return dict(ledger.history().entries)


def budget_is_right(before: Entries, after: Entries, place: RunPlace, site: str, rounds: int) -> list[str]:
    """Return what is wrong with a site's ledger after a run; nothing if no budget was doubled or refunded.

    - All that was spent before is still spent, and released as it was.
    - The run was charged under one id, however often it was submitted: each round at most once.
    - Every update that the coordinator took was charged, and its release committed.
    - All rounds of the run cost the same.
    """
    wrong = []
    if any(after.get(key) != entry for key, entry in before.items()):
        wrong.append("what was spent before has changed")
    new = {key: entry for key, entry in after.items() if key not in before}
    if len({run for run, _ in new}) > 1:
        wrong.append("the run was charged under two ids")
    if not {number for _, number in new} <= set(range(1, rounds + 1)):
        wrong.append("a round was charged that the run does not have")
    released = {number for (_, number), entry in new.items() if entry.committed is not None}
    if not rounds_of(place, site) <= released:
        wrong.append("an update was taken that the ledger has not released")
    if len({entry.reserved.charge.model_dump_json() for entry in new.values()}) > 1:
        wrong.append("rounds were charged differently")
    return wrong
