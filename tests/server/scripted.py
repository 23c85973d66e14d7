"""A Grid whose sites answer as a script says, on a clock that moves only by waiting, and runs on it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Error, Message

from common.codecs.codec import encode
from common.config.run import RunConfig
from common.flower_records import from_records, to_records
from common.wire import Refusal, TrainReply, TrainRequest, header_bytes, parse_header
from server.cohort import Member
from server.progress import Progress
from server.strategy import FederatedTuning
from simulations.flower_internals import identify_process
from tests.server.test_rounds import ADAPTER, BASE, RUN, UPDATE, description
from tests.server.test_transport import Seconds, Trickle

FAILS, REFUSES = "fails", "policy"
"""How a site answers: with Flower's error, or with a refusal of this code, as of any other."""

Script = Callable[[str, int, float], float | tuple[float, str]]
"""From site, round and time of the request to the seconds until it answers, and how if not with an update."""


class Scripted(Trickle):
    """Carries requests to sites that follow a script.

    Attributes:
        asked: site, round and time of every request, in order.
        most: requests to one site that were ever under way at once.
        lasting: site, round and time to live of every request.
    """

    def __init__(self, clock: Seconds, names: Iterable[str], script: Script) -> None:
        super().__init__(clock, {})
        self.script, self.names = script, dict(enumerate(names))
        self.asked: list[tuple[str, int, float]] = []
        self.most = 0
        self.lasting: list[tuple[str, int, float]] = []
        self._how: dict[str, str] = {}
        self._count = itertools.count(1)

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            site, number, now = (
                self.names[message.metadata.dst_node_id],
                int(message.metadata.group_id),
                self.clock.now(),
            )
            known = f"{next(self._count)}"
            message.metadata.__dict__["_message_id"] = known
            answer = self.script(site, number, now)
            seconds, self._how[known] = answer if isinstance(answer, tuple) else (answer, "")
            self.sent[known], self.at[known] = message, now + seconds
            self.asked.append((site, number, now))
            self.lasting.append((site, number, message.metadata.ttl))
            ids.append(known)
        at_work = Counter(message.metadata.dst_node_id for message in self.sent.values())
        self.most = max(self.most, *at_work.values())
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [known for known in message_ids if self.at[known] <= self.clock.now()]
        return [self._answer(self.sent.pop(known), self._how[known]) for known in ready]

    def _answer(self, message: Message, how: str) -> Message:
        if how == FAILS:
            return Message(Error(code=5), reply_to=message)
        if how:
            return Message(to_records(header_bytes(Refusal(code=how, place=""))), reply_to=message)
        known = parse_header(from_records(message.content)[0], TrainRequest)
        assert isinstance(known, TrainRequest)
        reply = TrainReply(
            site=self.names[message.metadata.dst_node_id], round=known.round, nonce=known.nonce, base_fingerprint=BASE,
            steps=3, train_loss=0.7, mechanism=None,
        )  # fmt: skip
        return Message(to_records(header_bytes(reply), encode(UPDATE, "fp32")), reply_to=message)


def play(
    config: RunConfig, names: Iterable[str], script: Script, **changes: Any
) -> tuple[Scripted, list[dict[str, Any]]]:
    """Run the round loop against a script; return the Grid and the records of the rounds."""
    identify_process()
    sites, records, clock = list(names), list[dict[str, Any]](), Seconds()
    grid = Scripted(clock, sites, script)
    FederatedTuning(
        config=config, members={site: Member(node, description(site)) for node, site in enumerate(sites)},
        progress=Progress(ADAPTER), base_fingerprint=BASE, run=RUN, clock=clock,
        round_done=lambda number, progress, record: records.append(record), **changes,
    ).start(grid)  # fmt: skip
    return grid, records
