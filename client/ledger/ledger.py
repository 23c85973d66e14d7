"""The ledger: reserve before training, commit before release, and never beyond the budget.

A round goes through two durable steps::

    reserve   the charge is written, or refused    ─→ train ─→   commit   the bytes are written   ─→ release

- The file is made once, by :meth:`Ledger.create`. Where it is missing everything is refused: a new one in its place
  would have forgotten all spend.
- From the reservation on the round counts as spent, whatever becomes of it.
- What is sent is what :meth:`Ledger.commit` returns. There is one entry and one release for a (run, round): whoever
  commits second gets the first one's bytes, and a repeated request gets them without any training.
- Whatever exception arises between the two, a refusal is committed as the round's release: it is sent, and sent again
  for every repeat; the round is never trained a second time.
- Only a reservation whose process was ended with no exception handled (a kill, a power cut, KeyboardInterrupt,
  SystemExit), or at a ledger that cannot be written, stays open. It may be trained again without a new charge: nothing
  of the first attempt left the site, and of all attempts only one ever will.
- That a round failed, or fell silent, depends on the data where the failure does: one bit a round that no noise covers.
  An attempt that always dies on one record tells of it through the silence, ledger or no ledger.
- A repeat that asks something else (another adapter, another config) is refused: answering would be a second release.
- Once a later round of the run is committed, the bytes of earlier ones are dropped; so are those of all but the newest
  few releases, whatever their run. A repeat of a dropped one is refused and never computed anew.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.ledger.dataset import Dataset
from client.ledger.events import Charge, Committed, DatasetSeen, Reserved, now
from client.ledger.file import new_file, transaction
from client.ledger.history import Entry, History
from client.ledger.spending import fits, steps_left
from client.ledger.store import Store, digest_of_members, start_chain
from client.site_config import Budget
from common.errors import PrivacyError


@dataclass(frozen=True)
class RoundRequest:
    """One round that a coordinator asks for.

    Attributes:
        run: the run's id, 32 hexadecimal digits.
        round: from 1.
        digest: SHA-256 of what it asks: config, base model and adapter.
    """

    run: str
    round: int
    digest: str

    def __str__(self) -> str:
        return f"round {self.round} of run {self.run}"


class Ledger:
    """A ledger file. Holds nothing open: every call is one transaction.

    Args:
        path: of the file, which :meth:`create` makes once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the file, in which nothing is spent: for data that no ledger was kept for before, and for no others.

        Raises:
            PrivacyError: if something stands there, or did when a process died (a journal); if it cannot be made there.
        """
        if os.path.lexists(f"{self.path}-journal"):
            raise PrivacyError(
                f"{self.path}-journal is left of an earlier ledger; expected a place that never had one. Restore the "
                "ledger beside it."
            )
        with new_file(self.path) as connection:
            start_chain(connection, secrets.token_bytes(32), now())

    def expect_ready(self) -> None:
        """Check that rounds can be reserved; take back what a crash left half-written.

        Raises:
            PrivacyError: if the file cannot be used or its chain is broken.
        """
        with self._open(write=True):
            pass

    def reserve(self, request: RoundRequest, dataset: Dataset, charge: Charge, budget: Budget) -> bytes | None:
        """Make sure that a round is charged, durably, before it is trained.

        Args:
            request: the round.
            dataset: the rows it would be trained on.
            charge: what it spends.
            budget: what may be spent in all.

        Returns:
            None if the round is to be trained now, or the bytes that were committed for it, to be sent as they are.

        Raises:
            PrivacyError: if the budget does not hold it, if it was asked differently before, if its bytes were dropped,
                or if the file cannot be used.
        """
        try:
            with self._open(write=True) as store:
                known = store.history.entries.get((request.run, request.round))
                members = _keyed(store.key, dataset)
                if known is not None:
                    return self._repeat(store, known, request, digest_of_members(members), charge)
                number, near = _locate(store, dataset, members)
                charges = store.history.charges(near)
                if not fits(charges, charge, budget):
                    raise _BeyondBudgetError(charges)
                if number is None:
                    number = self._see(store, dataset, members, near)
                store.append(
                    Reserved(
                        run=request.run,
                        round=request.round,
                        request=request.digest,
                        dataset=number,
                        charge=charge,
                        time=now(),
                    )
                )
        except _BeyondBudgetError as error:
            raise PrivacyError(_beyond(request, charge, budget, error.charges)) from None
        return None

    def commit(self, request: RoundRequest, payload: bytes) -> bytes:
        """Fix the release of a reserved round, durably, and return the bytes to send: those, or an earlier commit's.

        Raises:
            PrivacyError: for a round that is not reserved, or reserved for another request; if its bytes were dropped;
                if the file cannot be used. Then nothing may be sent.
        """
        with self._open(write=True) as store:
            entry = store.history.entries.get((request.run, request.round))
            if entry is None or entry.reserved.request != request.digest:
                raise PrivacyError(f"{request} is not reserved for this request; expected a reservation first.")
            if entry.committed is not None:
                return self._kept(store, request)
            digest = hashlib.sha256(payload).hexdigest()
            store.append(
                Committed(
                    run=request.run,
                    round=request.round,
                    payload=digest,
                    size_bytes=len(payload),
                    time=now(),
                )
            )
            store.keep_payload(request.run, request.round, payload)
        return payload

    def history(self) -> History:
        """Return what the ledger holds.

        Raises:
            PrivacyError: if the file cannot be used or its chain is broken.
        """
        with self._open(write=False) as store:
            return store.history

    def charges(self, dataset: Dataset) -> list[Charge]:
        """Return the charges that some record or person of ``dataset`` may have borne; writes nothing.

        Raises:
            PrivacyError: if the file cannot be used or its chain is broken.
        """
        with self._open(write=False) as store:
            _, near = _locate(store, dataset, _keyed(store.key, dataset))
            return store.history.charges(near)

    def verify(self) -> tuple[int, str]:
        """Check the whole file and return number and hash of its last event; writes nothing.

        Raises:
            PrivacyError: naming what is wrong.
        """
        with self._open(write=False) as store:
            store.expect_whole()
            return store.head

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[Store]:
        if not os.path.lexists(self.path):
            raise PrivacyError(
                f"ledger {self.path} does not exist; expected the one that holds what these data have spent. Restore "
                "it; only for data that never had one: fedtune-client new-ledger SITE_CONFIG."
            )
        with transaction(self.path, write=write) as connection:
            yield Store(connection, self.path)

    def _see(self, store: Store, dataset: Dataset, members: list[bytes], near: set[int]) -> int:
        number = store.append(
            DatasetSeen(
                source=dataset.source,
                fingerprint=dataset.fingerprint,
                num_rows=dataset.num_rows,
                members=digest_of_members(members),
                shares=tuple(sorted(near)),
                time=now(),
            )
        )
        store.add_members(number, members)
        return number

    def _repeat(self, store: Store, entry: Entry, request: RoundRequest, members: str, charge: Charge) -> bytes | None:
        reserved = entry.reserved
        if reserved.request != request.digest:
            raise PrivacyError(
                f"{request} was asked before with another adapter or config; expected the same request. A second "
                "release of one round is refused: start a new run."
            )
        if entry.committed is not None:
            return self._kept(store, request)
        if any(run == request.run and later > request.round for run, later in store.history.entries):
            raise PrivacyError(
                f"{request} was left open and later rounds of the run were asked for since; expected none: what "
                "a site keeps of a round that was cut off may be in them, and a second attempt would be a second "
                "release. It stays spent."
            )
        if reserved.charge != charge or store.history.datasets[reserved.dataset].members != members:
            raise PrivacyError(
                f"{request} was reserved for other rows or another noise; expected those of the reservation. It stays "
                "spent: restore the data file, or start a new run."
            )
        return None

    def _kept(self, store: Store, request: RoundRequest) -> bytes:
        kept = store.payload(request.run, request.round)
        if kept is None:
            raise PrivacyError(
                f"{request} was released before and its bytes were dropped after later ones; expected a later round, "
                "or another run. It is not computed a second time."
            )
        return kept


class _BeyondBudgetError(Exception):
    """Carries the charges out of the transaction, so that the file is not locked while the message is worked out."""

    def __init__(self, charges: list[Charge]) -> None:
        super().__init__()
        self.charges = charges


def _beyond(request: RoundRequest, charge: Charge, budget: Budget, charges: list[Charge]) -> str:
    left = steps_left(charges, charge, budget)
    return (
        f"{request} needs {charge.steps} steps, which would exceed the budget of ε {budget.epsilon:g} at "
        f"δ={budget.delta:g} (unit {budget.unit}); expected at most {left} steps more with this noise and sample rate, "
        f"{left // charge.steps} whole rounds. Leave the run, or raise budget.epsilon in the site config."
    )


def _keyed(key: bytes, dataset: Dataset) -> list[bytes]:
    """Return the members: HMAC-SHA-256 of each handle, in ascending order."""
    return sorted(hmac.digest(key, handle, "sha256") for handle in dataset.handles)


def _locate(store: Store, dataset: Dataset, members: list[bytes]) -> tuple[int | None, set[int]]:
    """Return the number of a dataset, None if it is new, and those it shares a record or person with."""
    number = store.history.dataset_of(digest_of_members(members))
    if number is not None:
        return number, store.history.sharing(number)
    return None, set(store.datasets_with(members))
