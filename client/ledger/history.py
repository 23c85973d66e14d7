"""What a ledger's events say: which datasets were seen, which rounds were spent on them, what was released."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from client.ledger.events import Charge, Committed, DatasetSeen, Event, Reserved


@dataclass
class Entry:
    """One round of one run: reserved, and committed once its release is fixed."""

    reserved: Reserved
    committed: Committed | None = None


@dataclass
class History:
    """The events of a ledger, in order.

    Attributes:
        datasets: by the number of their event.
        entries: by run and round.
    """

    datasets: dict[int, DatasetSeen] = field(default_factory=dict)
    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)

    def sharing(self, dataset: int) -> set[int]:
        """Return the datasets that have a record or person in common with ``dataset``, itself included."""
        later = {number for number, seen in self.datasets.items() if dataset in seen.shares}
        return {dataset, *self.datasets[dataset].shares} | later

    def charges(self, datasets: Collection[int]) -> list[Charge]:
        """Return the charges of ``datasets``: with those that :meth:`sharing` names, what any record may have borne.

        Every dataset that holds a given record of a dataset D shares that record with D, so that the charges of all
        datasets sharing with D bound what each of its records has spent. It is not followed further: a dataset that
        shares no record with D spent nothing of D's records.
        """
        return [entry.reserved.charge for entry in self.entries.values() if entry.reserved.dataset in datasets]

    def dataset_of(self, members: str) -> int | None:
        """Return the event of the dataset with exactly these members, if it was seen."""
        return next((number for number, seen in self.datasets.items() if seen.members == members), None)


def read_history(events: Iterable[tuple[int, Event]]) -> History | str:
    """Play numbered events, or return what is wrong with them."""
    history = History()
    for number, event in events:
        wrong = _play(history, number, event)
        if wrong is not None:
            return f"event {number} {wrong}"
    return history


def _play(history: History, number: int, event: Event) -> str | None:
    match event:
        case DatasetSeen():
            if not set(event.shares) <= history.datasets.keys():
                return "names a dataset that was not seen before"
            history.datasets[number] = event
        case Reserved():
            if (event.run, event.round) in history.entries:
                return f"reserves round {event.round} of run {event.run} a second time"
            if event.dataset not in history.datasets:
                return "names a dataset that was not seen before"
            history.entries[event.run, event.round] = Entry(event)
        case Committed():
            entry = history.entries.get((event.run, event.round))
            if entry is None or entry.committed is not None:
                return f"commits round {event.round} of run {event.run}, which was not open"
            entry.committed = event
        case _:
            return None if number == 1 else "opens the ledger a second time"
    return None
