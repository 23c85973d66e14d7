"""The round loop as a Flower strategy: it talks to a Grid and to nothing else.

``start`` differs from Flower's own in what it adds: it begins where a checkpoint left off, takes replies one at a time
as they arrive, writes a checkpoint after every round and evaluates when it is due. The hooks are those of every Flower
strategy, so it also works inside an app that calls Flower's ``Strategy.start``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.flower_records import from_records, to_records
from common.methods import kept_tensors
from common.wire import PAYLOAD
from server.admission import Admission
from server.clock import Clock, WallClock
from server.cohort import Member, sample_cohort
from server.events import Observer
from server.progress import Progress
from server.rounds import Round
from server.site_level import SiteLevel
from server.steering import Steering
from server.transport import exchange

logger = logging.getLogger(__name__)

ERRORS = {
    1: "the ClientApp could not be loaded",
    2: "the ClientApp raised",
    3: "the message expired",
    4: "the reply expired",
    5: "the node was lost, or died at work",
    8: "the ClientApp crashed",
}
"""What Flower's codes mean. Its own texts may quote what a site's code said, so they are not recorded."""

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
    completed_rounds: int = 0
    round_done: RoundDone | None = None

    def __post_init__(self) -> None:
        self._admission = Admission.of(self.config)
        self._round: Round | None = None
        self._site_of_node = {member.node_id: name for name, member in self.members.items()}

    def arrays(self) -> ArrayRecord:
        """Return what the coordinator keeps of the current adapter, packed as for the wire."""
        payload = encode(kept_tensors(self.config, self.progress.adapter), self.config.communication.codec)
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
        return list(self._requests(server_round).values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit and aggregate replies from any iterable; a lazy one is consumed as it yields.

        Raises:
            RunError: if too few updates are usable.
        """
        for reply in replies:
            site = self._site_of_node.get(reply.metadata.src_node_id)
            if site is not None:
                self._take(site, reply)
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
        last = self.config.federation.rounds if num_rounds is None else num_rounds
        seconds = self.config.federation.round_timeout_s if timeout is None else timeout
        for number in range(self.completed_rounds + 1, last + 1):
            if not self.steering.proceed(number, grid):
                break
            requests, timeout_s = self._requests(number), self.steering.round_timeout_s(seconds)
            for site, reply in exchange(grid, requests, timeout_s, self.clock):
                self._take(site, reply)
            self._finish_round()
            result.arrays = self.arrays()
            if evaluate_fn is not None:
                metrics = evaluate_fn(number, result.arrays)
                if metrics is not None:
                    result.evaluate_metrics_serverapp[number] = metrics
        return result

    def _requests(self, number: int) -> dict[str, Message]:
        known = list(self.members)
        private = self.site_level
        if private is None:
            wanted = self.steering.sites_per_round(self.config.federation.sites_per_round)
            names = sample_cohort(known, self.config, number, wanted)
        else:
            names = private.cohort(known, number)
        cohort = {name: self.members[name] for name in names}
        current = Round(
            number, cohort, self.progress.adapter, self.config, self._admission, self.base_fingerprint, self.run,
            self.progress.clip_norm, private, self.progress.moments,
        )  # fmt: skip
        self._round = current
        self.observer.round_started(number, names)
        return {
            name: Message(to_records(*current.request(name)), member.node_id, MessageType.TRAIN, group_id=str(number))
            for name, member in cohort.items()
        }

    def _take(self, site: str, reply: Message) -> None:
        current = self._current()
        if site not in current.cohort:
            return
        if reply.has_error():
            code = reply.error.code
            outcome = current.fail(site, "failed", f"Flower error {code}: {ERRORS.get(code, 'no known kind')}")
        else:
            try:
                header, payload = from_records(reply.content)
            except WireError as error:
                outcome = current.fail(site, "rejected", str(error))
            else:
                outcome = current.take(site, header, payload)
        if outcome.status != "admitted":
            logger.warning("round %d: %s %s: %s", current.number, site, outcome.status, outcome.reason)
        self.observer.site_answered(current.number, site, outcome)

    def _finish_round(self) -> None:
        current = self._current()
        adapter = current.finish()
        self.progress = Progress(adapter, current.clip_norm() or self.progress.clip_norm, current.moments)
        self.completed_rounds = current.number
        self._round = None
        if self.round_done is not None:
            self.round_done(current.number, self.progress, current.record())

    def _current(self) -> Round:
        if self._round is None:
            raise RunError("replies came before a round was configured; expected configure_train first.")
        return self._round
