"""A ledger together with the data and the budget it is kept for: what a site asks before it trains."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from client.ledger.dataset import Dataset
from client.ledger.events import Charge
from client.ledger.ledger import Ledger, RoundRequest
from client.ledger.spending import charge_of, segment_for
from client.site_config import Budget
from common.errors import PrivacyError
from common.privacy.planning import Mechanism
from common.wire import TrainRequest, header_bytes

_NO_NONCE = "0" * 32


@dataclass(frozen=True)
class SiteLedger:
    """The ledger of one site's rows.

    Attributes:
        ledger: the file.
        dataset: the rows.
        budget: what may be spent of each record or person.
    """

    ledger: Ledger
    dataset: Dataset
    budget: Budget

    def charge(self, mechanism: Mechanism | None) -> Charge:
        """Return what one round of ``mechanism`` spends, if this site may take part in such a run at all.

        Raises:
            PrivacyError: for a run without noise at the site, or one whose unit the budget cannot count; for a δ that
                these data make meaningless.
        """
        self.expect_delta()
        charge = charge_of(mechanism)
        segment_for(charge, self.budget)
        return charge

    def expect_delta(self) -> None:
        """Check the budget's δ against the data: at one over their number, giving one unit away whole would satisfy it.

        Raises:
            PrivacyError: if δ is not below one over the number of records, or of persons for a budget of unit user.
        """
        user = self.budget.unit == "user"
        num_units, units = (self.dataset.num_persons, "persons") if user else (self.dataset.num_rows, "records")
        if num_units is None:
            raise PrivacyError("a row names no person; expected one in every row, for a budget of unit 'user'. Add it.")
        if self.budget.delta >= 1 / num_units:
            raise PrivacyError(
                f"budget.delta is {self.budget.delta:g} at a site of {num_units} {units}; expected well below "
                f"{1 / num_units:.3g}, one over their number. Lower it in the site config."
            )

    def of_run(self, asked: RoundRequest, charge: Charge) -> list[Charge]:
        """Return what the run of a round has been charged, on whatever rows, with the round itself for ``charge``."""
        entries = self.ledger.history().entries
        others = [
            entry.reserved.charge
            for (run, number), entry in entries.items()
            if run == asked.run and number != asked.round
        ]
        return [*others, charge]

    def reserve(self, asked: RoundRequest, charge: Charge) -> bytes | None:
        """Charge a round before it is trained; see :meth:`Ledger.reserve`."""
        return self.ledger.reserve(asked, self.dataset, charge, self.budget)

    def commit(self, asked: RoundRequest, release: bytes) -> bytes:
        """Fix what is released for a round before it is sent; see :meth:`Ledger.commit`."""
        return self.ledger.commit(asked, release)


def round_asked(request: TrainRequest, payload: bytes) -> RoundRequest:
    """Return the round that a message asks for; a message sent again asks for the same.

    Args:
        request: the header; everything in it counts but the nonce, which is new with every sending.
        payload: the packed adapter.
    """
    header = header_bytes(request.model_copy(update={"nonce": _NO_NONCE}))
    digest = hashlib.sha256(hashlib.sha256(header).digest() + hashlib.sha256(payload).digest())
    return RoundRequest(request.run, request.round, digest.hexdigest())
