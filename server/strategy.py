"""The round loop as a Flower strategy: it talks to a Grid and to nothing else.

``start`` differs from Flower's own in what it adds: it begins where a checkpoint left off, takes replies one at a time
as they arrive, closes a round when it has enough or its deadline is there, lets late updates count in a later one,
writes a checkpoint after every round and evaluates when it is due. The hooks are those of every Flower strategy, so it
also works inside an app that calls Flower's ``Strategy.start``, but for late updates.

An update under way is held in memory alone. A run that is resumed asks its sites afresh, and answers to what was asked
before it stopped are lost; at sites with a ledger they count as spent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.flower_records import PAYLOAD, from_records, to_records
from common.methods import kept_tensors
from common.wire import CHANGED
from server.admission import Admission
from server.clock import AGAIN_S, Clock, WallClock, pause
from server.cohort import Member
from server.events import Observer
from server.late import Asked
from server.newcomers import Newcomers
from server.outcome import Outcome
from server.progress import Progress
from server.requests import failure, requests
from server.rounds import Round
from server.site_level import SiteLevel
from server.steering import Steering
from server.turns import Turns
from server.under_way import UnderWay

logger = logging.getLogger(__name__)

RoundDone = Callable[[int, Progress, dict[str, Any]], None]


@dataclass
class FederatedTuning(Strategy):
    """Samples sites, admits and aggregates their updates, round after round.

    Attributes:
        config: the run config.
        members: the sites of the federation, by name.
        progress: where the run stands; replaced after every round.
        base_fingerprint: of the base model.
        run: the run's id.
        site_level: what protects whole sites, if anything does.
        observer: told what happens.
        clock: what deadlines are read from.
        steering: asked before each round.
        newcomers: those who may come in between rounds, where any may.
        completed_rounds: rounds done already, from a checkpoint.
        round_done: called with number, progress and record after every round, before the next begins.
    """

    config: RunConfig
    members: Mapping[str, Member]
    progress: Progress
    base_fingerprint: str
    run: str
    site_level: SiteLevel | None = None
    observer: Observer = field(default_factory=Observer)
    clock: Clock = field(default_factory=WallClock)
    steering: Steering = field(default_factory=Steering)
    newcomers: Newcomers | None = None
    completed_rounds: int = 0
    round_done: RoundDone | None = None

    def __post_init__(self) -> None:
        self._admission = Admission.of(self.config)
        self._round: Round | None = None
        self._skips = 0
        self._turns = Turns(self.config, self.steering, self.site_level)
        self._joined, self._changed = list[str](), set[str]()

    def arrays(self) -> ArrayRecord:
        """Return what the coordinator keeps of the current adapter, to the bit."""
        payload = encode(kept_tensors(self.config, self.progress.adapter), "fp32")
        return to_records(b"", payload).array_records[PAYLOAD]

    def summary(self) -> None:
        """Log one line on what is about to run."""
        logger.info(
            "%s: %d rounds, %d sites, method %s",
            self.config.name, self.config.federation.rounds, len(self.members), self.config.aggregation.method,
        )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample the cohort of a round and return the requests to it; ``arrays`` is :meth:`arrays`."""
        if self.config.federation.carries:
            raise RunError("late updates need this strategy's own start; expected late 'drop' and mode 'sync'.")
        current, seconds = self._begin(server_round), self.config.federation.round_timeout_s
        return list(requests(current, self.config, seconds, current.cohort).values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit and aggregate replies from any iterable; a lazy one is consumed as it yields.

        Raises:
            RunError: if too few updates are usable.
        """
        current = self._current()
        for reply in replies:
            sender = reply.metadata.src_node_id
            site = next((name for name, member in current.cohort.items() if member.node_id == sender), None)
            if site is not None and not self._turns.is_full(current):
                self._take(site, None, reply)
        self._finish_round()
        return self.arrays(), MetricRecord({"round": server_round})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nothing: the coordinator evaluates on its own test part; sites release no metrics."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate; see :meth:`configure_evaluate`."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left.

        Args:
            grid: what carries the messages.
            initial_arrays: not used; progress is an attribute.
            num_rounds: last round, by default ``federation.rounds``.
            timeout: seconds for a round, by default ``federation.round_timeout_s``.
            train_config: not used; everything is in the run config.
            evaluate_config: not used.
            evaluate_fn: called with the round and the arrays after every round.

        Raises:
            RunError: if a round has too few usable updates. The checkpoint before it stands.
        """
        self.summary()
        result = Result()
        under_way = UnderWay(grid, self.clock, self.config)
        last = self.config.federation.rounds if num_rounds is None else num_rounds
        seconds = self.config.federation.round_timeout_s if timeout is None else timeout
        for number in range(self.completed_rounds + 1, last + 1):
            if not self.steering.proceed(number, grid):
                break
            self._welcome(number, grid)
            began, given = self.clock.now(), self.steering.round_timeout_s(seconds)
            if self._play(under_way, number, given) or number == last:
                self._skips = 0
            else:
                again = self.clock.now() + AGAIN_S * 2.0 ** min(self._skips, 20)
                self._skips += 1
                pause(grid, self.clock, min(began + given, again), self.steering.ends)
            result.arrays = self.arrays()
            if evaluate_fn is not None:
                metrics = evaluate_fn(number, result.arrays)
                if metrics is not None:
                    result.evaluate_metrics_serverapp[number] = metrics
        return result

    def _welcome(self, number: int, grid: Grid) -> None:
        """Take in the sites that have come since the round before; one that has changed is to describe itself anew."""
        if self.newcomers is None:
            return
        stay = {name: member for name, member in self.members.items() if name not in self._changed}
        come = self.newcomers.come(grid, stay)
        self._changed, self._joined = set(), sorted(come)
        self.members = dict(sorted({**stay, **come}.items()))
        for name in self._joined:
            logger.info("site %s takes part from round %d on", name, number)

    def _play(self, under_way: UnderWay, number: int, seconds: float) -> bool:
        """Run one round: ask, take what comes until it closes, and aggregate. Return whether it had what it needs."""
        deadline = self.clock.now() + seconds
        current = self._begin(number, under_way.sites)
        under_way.ask(current, current.cohort, seconds)
        self._collect(under_way, current, deadline, seconds)
        lacking, federation = current.lacking(), self.config.federation
        if lacking is not None and federation.below_min == "extend":
            logger.warning("%s The round is extended by %g s.", lacking, federation.extension_s)
            self._extend(under_way, current, self.clock.now() + federation.extension_s, seconds)
        under_way.end_round(current, full=self._turns.is_full(current))
        return self._finish_round()

    def _collect(self, under_way: UnderWay, current: Round, until: float, seconds: float) -> None:
        """Take what comes until the round closes; in mode async, sites that are free by then are asked."""
        federation = self.config.federation
        while not self._is_closed(current) and (arrived := under_way.receive(until)) is not None:
            (site, number), reply = arrived
            owed = under_way.owed((site, number))
            if owed is not None or number == current.number:
                self._take(site, owed, reply)
            if federation.mode == "async" and not self._turns.is_full(current):
                free = self._turns.free(under_way.sites | self._changed, current)
                for name in free:
                    current.invite(self.members[name])
                self._ask_more(under_way, current, free, seconds)

    def _extend(self, under_way: UnderWay, current: Round, deadline: float, seconds: float) -> None:
        """Wait once more; while the round lacks updates, ask sites that failed or refused again, ever more seldom."""
        carries = self.config.federation.carries
        due, patience = self.clock.now(), AGAIN_S
        while (now := self.clock.now()) < deadline and current.lacking() is not None:
            if now >= due:
                again = current.ask_again(self._turns.room(under_way.sites))
                self._ask_more(under_way, current, again, seconds if carries else deadline - now)
                due, patience = now + patience, 2 * patience
            if not current.failed and not (under_way.sites if carries else current.unanswered):
                return
            self._collect(under_way, current, min(deadline, due), seconds)
            if current.lacking() is not None and not (under_way.sites if carries else current.unanswered):
                pause(under_way.grid, self.clock, min(deadline, due))
        self._collect(under_way, current, deadline, seconds)

    def _ask_more(self, under_way: UnderWay, current: Round, names: list[str], seconds: float) -> None:
        """Send further requests of a round that is on."""
        if names:
            under_way.ask(current, names, seconds, further=True)
            self.observer.sites_asked(current.number, names)

    def _begin(self, number: int, busy: Set[str] = frozenset()) -> Round:
        """Draw the sites of a round and open it with those that are not busy."""
        cohort = {name: self.members[name] for name in self._turns.draw(number, list(self.members), busy)}
        current = Round(
            number, cohort, self.progress.adapter, self.config, self._admission, self.base_fingerprint, self.run,
            self.progress.clip_norm, self.site_level, self.progress.moments,
            self.members if self.config.federation.carries else None, self.progress.controls,
            {name: member.weight(self.config) for name, member in self.members.items()},
        )  # fmt: skip
        self._round = current
        self.observer.round_started(number, list(cohort))
        return current

    def _is_closed(self, current: Round) -> bool:
        """Whether a round need not wait: it is full, or all of it answered and late updates alone could come."""
        if self._turns.is_full(current):
            return True
        federation = self.config.federation
        if federation.mode == "async" or current.unanswered > 0:
            return False
        return not federation.carries or current.lacking() is None

    def _take(self, site: str, owed: Asked | None, reply: Message) -> None:
        """Take a reply: for this round, or for what the site owes of an earlier one."""
        current = self._current()
        outcome = self._read(site, owed, reply)
        if str(outcome.reason).startswith(f"{CHANGED}:"):
            self._changed.add(site)
        if outcome.status not in ("admitted", "spare"):
            logger.warning("round %d: %s %s: %s", current.number, site, outcome.status, outcome.reason)
        self.observer.site_answered(current.number, site, outcome)

    def _read(self, site: str, owed: Asked | None, reply: Message) -> Outcome:
        """Return what becomes of a reply."""
        current, federation = self._current(), self.config.federation
        if reply.has_error():
            return current.fail(site, "failed", failure(reply), owed)
        try:
            header, payload = from_records(reply.content)
        except WireError as error:
            return current.fail(site, "rejected", str(error), owed)
        if owed is None:
            return current.take(site, header, payload)
        size, age = len(header) + len(payload), current.number - owed.request.round
        if not federation.carries:
            return current.pass_over(owed, "spare", "its round had its updates before this one", size)
        if age > federation.max_staleness:
            reason = f"it was asked {age} rounds ago; expected at most {federation.max_staleness} (max_staleness)"
            return current.pass_over(owed, "late", reason, size)
        return current.take_late(owed, header, payload)

    def _finish_round(self) -> bool:
        """Aggregate or skip the round, and return whether it had what it needs."""
        current = self._current()
        if self._turns.is_full(current):
            late = self.config.federation.carries
            current.give_up("late" if late else "spare", "the round had its updates before this one")
        for site, outcome in current.settle():
            logger.warning("round %d: %s %s: %s", current.number, site, outcome.status, outcome.reason)
        lacking = current.lacking()
        if lacking is not None and self.config.federation.below_min == "skip":
            self._skip(current, lacking)
        else:
            adapter = current.finish()
            unusable = current.unusable(adapter)
            if unusable is not None:
                self._skip(current, unusable)
            else:
                clip_norm = current.clip_norm() or self.progress.clip_norm
                self.progress = Progress(adapter, clip_norm, current.moments, current.controls())
        self.completed_rounds = current.number
        self._round = None
        if self.round_done is not None:
            joined = {"joined": self._joined} if self._joined else {}
            self.round_done(current.number, self.progress, {**current.record(), **joined})
        return lacking is None

    def _skip(self, current: Round, reason: str) -> None:
        logger.warning("%s The round is skipped.", reason)
        self.progress = replace(self.progress, adapter=current.skip(reason))

    def _current(self) -> Round:
        if self._round is None:
            raise RunError("replies came before a round was configured; expected configure_train first.")
        return self._round
