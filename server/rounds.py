"""One round: requests to its cohort, replies taken as they come, and the next adapter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from common.config.run import RunConfig
from common.errors import AdmissionError, RunError
from common.methods import method_of
from common.models.adapter import fresh_factors
from common.tensors import Tensors, l2_norm
from common.wire import CHANGED
from server.admission import Admission
from server.aggregation.robust import expect_enough_sites
from server.bounds import MedianBound, beyond_use, capped
from server.cohort import Member
from server.collected import Collected
from server.invitations import Invitations
from server.late import Asked, Carried, damped
from server.outcome import Outcome
from server.site_level import SiteLevel
from server.told_norms import ToldNorms
from server.variates import ControlRound, Controls

NO_REPLY = "no reply within federation.round_timeout_s, or the extension"

_NOT_BAD = ("refused", CHANGED, "mechanism", "norm")
"""Why an update may be rejected though its site is honest: it may refuse, have other rows by now, or be far off."""


class Round:
    """Collects one round.

    Args:
        number: from 1.
        cohort: members that are asked, by site name.
        adapter: the whole adapter that the round starts from, with its correction.
        config: the run config.
        admission: the checks.
        base: fingerprint of the base model.
        run: the run's id.
        clip_norm: where adaptive clipping stands.
        site_level: what protects whole sites, if anything does.
        moments: of the server optimizer, from the rounds before.
        controls: control variates, from the rounds before.
        federation: declared weights of all its sites, those that are not asked included; the cohort's if not given.
        others: members that may come in while the round is on, or owe an update of an earlier one.

    Attributes:
        number: of the round.
        cohort: members that were asked so far.
        outcomes: of those that answered or were given up.
        carried: what became of updates of earlier rounds, and of requests of this one that were repeated.
        asked: the request to each of the cohort.
        found_out: sites that admission found to be hostile or broken in this round.
    """

    def __init__(
        self, number: int, cohort: Mapping[str, Member], adapter: Tensors, config: RunConfig,
        admission: Admission, base: str, run: str, clip_norm: float | None = None, site_level: SiteLevel | None = None,
        moments: Tensors | None = None, others: Mapping[str, Member] | None = None, controls: Controls | None = None,
        federation: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.cohort: dict[str, Member] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.carried: list[Carried] = []
        self.asked: dict[str, Asked] = {}
        self._config, self._site_level = config, site_level
        self._given, self._skipped = adapter, ""
        self._adapter = fresh_factors(adapter, config.seed, number) if method_of(config).fresh else adapter
        self._collected = Collected(number, self._adapter, config, site_level, {} if moments is None else moments)
        self._told = ToldNorms(config.privacy)
        self.found_out: set[str] = set()
        self._admission = admission
        multiple = config.aggregation.norm_bound_of_median
        self._bound = None if multiple is None else MedianBound(multiple)
        declared = {site: member.weight(config) for site, member in {**(others or {}), **cohort}.items()}
        if config.aggregation.max_weight is not None:
            declared = capped(declared, config.aggregation.max_weight)
        largest = max(declared.values(), default=1.0)
        self._weights = {site: weight / largest for site, weight in declared.items()}
        self._control: ControlRound | None = None
        if config.training.control_variates:
            trained = {name: self._adapter[name] for name in self._collected.sent}
            whole = declared if federation is None else federation
            self._control = ControlRound(number, controls or Controls(), trained, config, whole, largest)
        self._invitations = Invitations(
            number, self._adapter, self._collected.sent, config, run, base, clip_norm, self._control
        )
        for member in cohort.values():
            self.invite(member)
        self._started = time.perf_counter()
        self._aggregating = 0.0

    @property
    def count(self) -> int:
        """Number of updates admitted so far, of this round and of earlier ones."""
        held = 0 if self._bound is None else len(self._bound.held) - len(self._bound.beyond())
        return self._collected.count + held

    @property
    def moments(self) -> Tensors:
        """The server optimizer's moments."""
        return self._collected.moments

    @property
    def counted(self) -> set[str]:
        """The sites whose update of an earlier round was admitted in this one."""
        return {one.site for one in self.carried if one.outcome.status == "admitted"}

    @property
    def unanswered(self) -> int:
        """Number of sites of the cohort that neither answered nor were given up."""
        return len(self.cohort) - len(self.outcomes)

    @property
    def hidden(self) -> int:
        """Number of bad sites that a round needs others to outvote: not those found out that count with no update."""
        voting = self.counted | {site for site, outcome in self.outcomes.items() if outcome.status == "admitted"}
        return max(0, self._config.aggregation.robust_sites - len(self.found_out - voting))

    def invite(self, member: Member) -> None:
        """Make a member part of the cohort."""
        self.cohort[member.name] = member
        self.asked[member.name] = self._invitations.to(member)

    def request(self, site: str) -> tuple[bytes, bytes]:
        """Return header and payload of the request to ``site``."""
        return self._invitations.parts(self.asked[site])

    def take(self, site: str, header: bytes, payload: bytes) -> Outcome:
        """Admit or reject the reply of ``site`` and, if admitted, add its update. A site counts once."""
        if site not in self.outcomes:
            self.outcomes[site] = self._taken(self.asked[site], header, payload)
        return self.outcomes[site]

    def take_late(self, asked: Asked, header: bytes, payload: bytes) -> Outcome:
        """Admit or reject the answer to a request of an earlier round, and add its update, damped."""
        return self._carry(asked, self._taken(asked, header, payload))

    def fail(self, site: str, status: str, reason: str, owed: Asked | None = None) -> Outcome:
        """Record that no usable reply of ``site`` will come, or to a request of an earlier round that it owed."""
        if status == "rejected":
            self.found_out.add(site)
        if owed is not None:
            return self._carry(owed, Outcome(status, reason))
        if site not in self.outcomes:
            self.outcomes[site] = Outcome(status, reason, **self.asked[site].charge())
        return self.outcomes[site]

    def pass_over(self, asked: Asked, status: str, reason: str, bytes_up: int) -> Outcome:
        """Record an answer to a request of an earlier round that came when none was wanted any more."""
        return self._carry(asked, Outcome(status, reason, bytes_up=bytes_up))

    @property
    def failed(self) -> list[str]:
        """The sites that failed or refused, and may do better."""
        return [site for site, outcome in self.outcomes.items() if outcome.status == "failed" or _refused(outcome)]

    def ask_again(self, most: int | None = None) -> list[str]:
        """Take sites that :attr:`failed` back into the cohort, each with a fresh request, and return them.

        They are charged once: a ledger knows the round. What the first attempt came to is told beside the round.

        Args:
            most: how many; all if not given.
        """
        again = self.failed[:most]
        for site in again:
            self._carry(self.asked[site], replace(self.outcomes.pop(site), mechanism=None))
            self.invite(self.cohort[site])
        return again

    def give_up(self, status: str = "late", reason: str = NO_REPLY) -> None:
        """Record of all that have not answered that the round goes on without them."""
        for site in self.cohort.keys() - self.outcomes.keys():
            self.fail(site, status, reason)

    def lacking(self) -> str | None:
        """Return what the round lacks to be aggregated; None if nothing.

        It needs ``federation.min_sites`` updates and what a robust rule needs. Under site-level privacy the number of
        sites is left to chance, and only a round that lost all it had asked lacks any; sites that admission found out
        count as never asked, so that a bad one that is drawn alone ends no run.
        """
        asked = self.cohort.keys() - self.found_out
        least = self._config.federation.min_sites if self._site_level is None else min(1, len(asked))
        if self.count < least:
            lost = dict.fromkeys(sorted(self.cohort.keys() - self.outcomes.keys()), NO_REPLY)
            lost |= {site: str(o.reason) for site, o in self.outcomes.items() if o.status != "admitted"}
            first = "".join(f" First of {len(lost)} lost: site {site!r}, {lost[site]}." for site in sorted(lost)[:1])
            return (
                f"round {self.number} has {self.count} usable updates; expected at least {least} "
                f"(federation.min_sites).{first}"
            )
        settings = self._config.aggregation
        if settings.robust != "none":
            try:
                expect_enough_sites(settings.robust, self.hidden, self.count, "the round")
            except RunError as error:
                return str(error)
        return None

    def finish(self) -> Tensors:
        """Return the next adapter, whole.

        Raises:
            RunError: for a round that is :meth:`lacking`.
        """
        self.give_up()
        self.settle()
        lacking = self.lacking()
        if lacking is not None:
            raise RunError(lacking)
        began = time.perf_counter()
        adapter = self._collected.aggregated(self.hidden)
        self._aggregating += time.perf_counter() - began
        return adapter

    def settle(self) -> list[tuple[str, Outcome]]:
        """Add what was held until the median of the round's norms is known; return the sites rejected by it."""
        if self._bound is None:
            return []
        beyond, rejected = self._bound.beyond(), []
        for key, held in self._bound.release().items():
            reason = beyond.get(key)
            if reason is None:
                try:
                    self._add(key, held.asked, held.update, held.weight)
                    continue
                except AdmissionError as error:
                    self.found_out.add(held.asked.member.name)
                    reason = str(error)
            rejected.append((held.asked.member.name, self._reject(held.asked, reason)))
        return rejected

    def _reject(self, asked: Asked, reason: str) -> Outcome:
        """Replace the outcome of an update that was admitted before."""
        site, number = asked.member.name, asked.request.round
        if number == self.number:
            self._told.forget(site)
            self.outcomes[site] = replace(self.outcomes[site], status="rejected", reason=reason, weight=0.0)
            return self.outcomes[site]
        place = next(i for i, one in enumerate(self.carried) if (one.site, one.round) == (site, number))
        outcome = replace(self.carried[place].outcome, status="rejected", reason=reason, weight=0.0)
        self.carried[place] = replace(self.carried[place], outcome=outcome)
        return outcome

    def unusable(self, adapter: Tensors) -> str | None:
        """Return why no site could go on from an adapter that the round made; None if each could."""
        found = beyond_use(adapter)
        return found and (
            f"round {self.number} made an adapter with {found}: somebody sent hostile or broken ones, or a rate is too "
            "high. Choose a robust rule (aggregation.robust) or a bound on norms, or lower training.lr or "
            "aggregation.server_lr."
        )

    def skip(self, reason: str) -> Tensors:
        """Return the adapter that the round started from; what was admitted does not count."""
        self.give_up()
        self._skipped = reason
        self._told.forget_all()

        def dropped(outcome: Outcome) -> Outcome:
            return replace(outcome, status="dropped") if outcome.status == "admitted" else outcome

        self.outcomes = {site: dropped(outcome) for site, outcome in self.outcomes.items()}
        self.carried = [replace(one, outcome=dropped(one.outcome)) for one in self.carried]
        return self._given

    def clip_norm(self) -> float | None:
        """Return where adaptive clipping goes on; None where no site told where it ended."""
        return self._told.next()

    def controls(self) -> Controls:
        """Return the control variates after the round; empty without them."""
        return Controls() if self._control is None else self._control.finish()

    def record(self) -> dict[str, Any]:
        """Return the round as plain values for ``metrics.jsonl``; seconds of training are those waiting for sites."""
        total, products = time.perf_counter() - self._started, self._collected.products
        shares = self._collected.shares
        carries = self._config.federation.carries
        return {
            "kind": "round",
            "round": self.number,
            "sites": {site: asdict(self.outcomes[site]) for site in sorted(self.outcomes)},
            "products": asdict(products) if products and not self._skipped else None,
            **({"robust_shares": shares} if shares is not None and not self._skipped else {}),
            **({"carried": [one.as_dict() for one in self.carried]} if carries or self.carried else {}),
            **({"skipped": self._skipped} if self._skipped else {}),
            "seconds": {
                "total": total,
                "training": total - self._aggregating,
                "aggregation": self._aggregating,
            },
        }

    def _taken(self, asked: Asked, header: bytes, payload: bytes) -> Outcome:
        """Admit or reject an answer by its own round's request and, if admitted, add its update."""
        began = time.perf_counter()
        site, staleness = asked.member.name, self.number - asked.request.round
        up, weight = len(header) + len(payload), self._weights[site]
        charge = {} if staleness else asked.charge()
        try:
            reply, update = self._admission.admit(header, payload, asked.request, asked.member, asked.manifest)
            change: Tensors = {}
            if self._control is not None:
                update, change = self._control.admit(update, reply.steps, asked.member.description.num_examples or 0)
            key = f"{site},\u00a0round {asked.request.round}" if staleness else site  # no name has such a space
            added = damped(update, staleness, self._config.federation.staleness_exponent)
            if self._bound is None:
                self._add(key, asked, added, weight)
            else:
                self._bound.hold(key, asked, update, added, weight)
            if self._control is not None:
                self._control.add(site, change, weight)
        except AdmissionError as error:
            if error.reason not in _NOT_BAD:
                self.found_out.add(site)
            outcome = Outcome("rejected", str(error), bytes_up=up, **charge)
        else:
            told: dict[str, Any] = {}
            if self._site_level is None:
                told = {"update_norm": l2_norm(update), "train_loss": reply.train_loss}
            outcome = Outcome("admitted", bytes_up=up, steps=reply.steps, weight=weight, **told, **charge)
            if reply.clip_norm is not None:
                self._told.tell(asked, reply.clip_norm)
        self._aggregating += time.perf_counter() - began
        return outcome

    def _add(self, key: str, asked: Asked, update: Tensors, weight: float) -> None:
        self._collected.add(key, asked.member.rank(self._config), update, weight)

    def _carry(self, asked: Asked, outcome: Outcome) -> Outcome:
        number = asked.request.round
        self.carried.append(Carried(asked.member.name, number, self.number - number, outcome))
        return outcome


def _refused(outcome: Outcome) -> bool:
    return outcome.status == "rejected" and str(outcome.reason).startswith("refused:")
