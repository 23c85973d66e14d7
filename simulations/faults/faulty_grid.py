"""A Grid around any other, on which sites drop out, take simulated time, and may be hostile.

Train requests to sites that are not there go nowhere. The others are handled by the Grid inside; their replies are
altered by the site's attacks and given out when the simulated clock has reached their arrival, so that the
coordinator's own deadline decides who is late. To know the order of arrival, the replies of a round are held until the
last one is computed. A reply to a message that the coordinator stopped asking for is kept for some rounds, as a
SuperLink keeps it until its time to live has passed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.codecs.packing import Packing
from common.errors import WireError
from common.flower_records import from_records, to_records
from common.randomness import numpy_generator
from common.wire import Refusal, TrainReply, TrainRequest, parse_header
from simulations.faults.attacks import ATTACKS, DESCRIPTION_ATTACKS, Answer, Scene
from simulations.faults.clock import SimulatedClock, SiteSeconds
from simulations.faults.faults import Faults, Tokens
from simulations.faults.replay import OldAnswers

NODE_UNAVAILABLE, EXPIRED = 5, 3
"""Flower's error codes: for a node that no longer sends heartbeats, and a message that nobody took in its time."""
KEPT_ROUNDS = 16
_POLL_S = 0.01


@dataclass
class _Sent:
    """A message on its way.

    Attributes:
        message: itself.
        number: of the round; 0 for a description.
        at: since when.
        replies: once they are there.
        turn: who is first of a round's that arrive at one moment: drawn, or the same sites would be first in every one.
    """

    message: Message
    number: int
    at: float
    replies: list[Message]
    turn: float


class FaultyGrid(Grid):
    """Carries messages as the Grid inside does, with the faults of a run.

    Args:
        inner: computes the honest replies.
        faults: what befalls the sites.
        first_node: node id of the first site.
        packing: of updates.
        tokens: counts the tokens of a site and round.
        old: where answers that are replayed are kept.
    """

    def __init__(
        self, inner: Grid, faults: Faults, first_node: int, packing: Packing, tokens: Tokens, old: OldAnswers
    ) -> None:
        self.clock = SimulatedClock()
        self._inner, self._faults, self._first_node = inner, faults, first_node
        self._packing, self._tokens, self._old = packing, tokens, old
        self._sent: dict[str, _Sent] = {}
        self._computing: set[str] = set()
        self._late: dict[str, int] = {}
        self._seconds: dict[int, dict[str, SiteSeconds]] = {}
        self._round_began = self._round_ended = 0.0

    def set_run(self, run: Any) -> None:  # its type is an internal of Flower's
        """Set the run of the Grid inside."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, there or not: the federation is fixed before the first round."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids; those to sites that are not there go nowhere."""
        numbered = [(message, self._round_of(message)) for message in messages]
        for number in sorted({number for _, number in numbered if number and number not in self._seconds}):
            self._begin(number)
        heard = [not number or self._faults.answers(self._site(message), number) for message, number in numbered]
        inside = iter(
            self._inner.push_messages([message for (message, _), there in zip(numbered, heard, strict=True) if there])
        )
        ids = []
        for (message, number), there in zip(numbered, heard, strict=True):
            if there:
                message_id = next(inside)
                self._computing.add(message_id)
                self._sent[message_id] = self._on_its_way(message, number)
            else:
                message_id = self._into_the_void(message, number)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to the message of ``message_ids`` that was answered first, if the clock has reached it."""
        self._compute()
        arrivals = self.clock.arrivals
        ready = [known for known in message_ids if arrivals.get(known, math.inf) <= self.clock.now()]
        if not ready:
            return []
        first = min(ready, key=lambda known: (arrivals[known], self._sent[known].number, self._sent[known].turn))
        del arrivals[first]
        return self._sent.pop(first).replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the replies in the order of their arrival, until ``timeout`` simulated seconds have passed."""
        deadline = self.clock.now() + (math.inf if timeout is None else timeout)
        waiting = set(self.push_messages(messages))
        while waiting:
            replies = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            yield from replies
            if not replies:
                coming = min(self.clock.arrivals[known] for known in waiting)
                self.clock.wait(min(coming, deadline))
                if coming > deadline or coming == math.inf:
                    return

    def round_notes(self, number: int) -> dict[str, Any]:
        """Return the simulated seconds of a round that has just ended: in all, and of the sites that answered it."""
        sites, began = self._seconds.get(number, {}), self._round_began
        if number not in self._seconds:  # nobody was asked: it began where the one before ended
            began = self._round_ended
        self._round_ended = self.clock.now()
        self._release(number + 1)
        return {
            "simulated_s": {
                "round": self.clock.now() - began,
                "sites": {site: sites[site].as_dict() for site in sorted(sites)},
            }
        }

    def _begin(self, number: int) -> None:
        """Begin a round: updates that are due now arrive, and those nobody asked for in many rounds are let go."""
        self._round_began = self.clock.now()
        self._seconds[number] = {}
        self._release(number)
        old, now = number - KEPT_ROUNDS, self.clock.now()
        over = [k for k, s in self._sent.items() if 0 < s.number < old and s.at + s.message.metadata.ttl < now]
        for message_id in over:
            del self._sent[message_id]
            self.clock.arrivals.pop(message_id, None)
            self._late.pop(message_id, None)

    def _release(self, number: int) -> None:
        """Let the updates arrive that were held back until round ``number``, also where it asks nobody."""
        for message_id, due in list(self._late.items()):
            if due <= number:
                self.clock.arrivals[message_id] = self.clock.now()
                del self._late[message_id]

    def _on_its_way(self, message: Message, number: int) -> _Sent:
        turn = float(numpy_generator(self._faults.seed, "turn", number, self._site(message)).random())
        return _Sent(message, number, self.clock.now(), [], turn)

    def _into_the_void(self, message: Message, number: int) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        notice, expires = self._faults.config.notice_s, message.metadata.ttl
        lost = notice is not None and notice < expires
        error = Error(code=NODE_UNAVAILABLE if lost else EXPIRED, reason="the site is gone")
        sent = self._sent[message_id] = self._on_its_way(message, number)
        sent.replies.append(Message(error, reply_to=message))
        self.clock.arrivals[message_id] = self.clock.now() + (notice if notice is not None and lost else expires)
        return message_id

    def _compute(self) -> None:
        """Have the Grid inside answer all that it was sent, and set down when each answer arrives."""
        while self._computing:
            replies = list(self._inner.pull_messages(self._computing))
            for reply in replies:
                message_id = reply.metadata.reply_to_message_id
                self._computing.discard(message_id)
                self._answered(message_id, reply)
            if not replies:
                time.sleep(_POLL_S)

    def _answered(self, message_id: str, reply: Message) -> None:
        sent = self._sent[message_id]
        site = self._site(sent.message)
        sent.replies.append(reply)
        self.clock.arrivals[message_id] = sent.at
        if reply.has_error():
            return
        honest = Answer(*from_records(reply.content))
        answers = self._hostile(site, sent, honest)
        if answers != [honest]:
            sent.replies = [Message(to_records(a.header, a.payload), reply_to=sent.message) for a in answers]
        if sent.number == 0:
            return
        down = sum(map(len, from_records(sent.message.content)))
        up = sum(len(answer.header) + len(answer.payload) for answer in answers)
        seconds = self._faults.seconds(site, sent.number, down, up, _steps(honest), self._tokens)
        self._seconds[sent.number][site] = seconds
        self.clock.arrivals[message_id] = sent.at + seconds.total
        rounds = self._faults.rounds_late(site, sent.number)
        if rounds:
            self._late[message_id] = sent.number + rounds
            self.clock.arrivals[message_id] = math.inf

    def _hostile(self, site: str, sent: _Sent, honest: Answer) -> list[Answer]:
        """Return what a site sends instead of its honest answer; a refusal goes out as it is."""
        if _refused(honest):
            return [honest]
        node, answers = sent.message.metadata.dst_node_id, [honest]
        known = ATTACKS if sent.number else DESCRIPTION_ATTACKS
        for name in self._faults.attacks(site, sent.number):
            if name not in known:
                continue
            draw = numpy_generator(self._faults.seed, f"attack {name}", sent.number, site)
            scene = Scene(self._packing, draw, self._old.before(node, sent.number) if name == "replay" else None)
            answers = [altered for answer in answers for altered in known[name](answer, scene)]
        if sent.number and self._faults.replays(site):
            self._old.keep(node, sent.number, honest)
        return answers

    def _site(self, message: Message) -> str:
        return self._faults.sites[message.metadata.dst_node_id - self._first_node]

    def _round_of(self, message: Message) -> int:
        """Return the round of a train request, 0 for any other message."""
        if message.metadata.message_type != MessageType.TRAIN:
            return 0
        request = parse_header(from_records(message.content)[0], TrainRequest)
        return 0 if isinstance(request, Refusal) else request.round


def _refused(answer: Answer) -> bool:
    try:
        Refusal.model_validate_json(answer.header)
    except ValueError:
        return False
    return True


def _steps(answer: Answer) -> int:
    """Return the steps that an honest answer tells; 0 for a refusal."""
    try:
        reply = parse_header(answer.header, TrainReply)
    except WireError:
        return 0
    return 0 if isinstance(reply, Refusal) else reply.steps
