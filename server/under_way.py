"""Requests whose answers are waited for: those of the round that is on, and those that are left of earlier ones."""

from __future__ import annotations

from collections.abc import Collection

from flwr.app import Message
from flwr.serverapp import Grid

from common.config.run import RunConfig
from server.clock import Clock
from server.late import Asked
from server.requests import Call, requests
from server.rounds import Round
from server.transport import Exchange


class UnderWay:
    """Sends the requests of rounds and keeps what checks the answers.

    Args:
        grid: what carries the messages.
        clock: what deadlines are read from.
        config: the run config.
    """

    def __init__(self, grid: Grid, clock: Clock, config: RunConfig) -> None:
        self.grid = grid
        self._exchange: Exchange[Call] = Exchange(grid, clock)
        self._clock, self._config = clock, config
        self._owed: dict[Call, Asked] = {}
        self._until: dict[Call, float] = {}

    @property
    def sites(self) -> set[str]:
        """The sites whose answers are waited for."""
        return {site for site, _ in self._exchange.under_way()}

    def ask(self, current: Round, names: Collection[str], seconds: float, *, further: bool = False) -> None:
        """Send requests of a round to some of its cohort.

        Args:
            current: the round.
            names: of the sites.
            seconds: that they have to answer.
            further: whether the round is on already.
        """
        messages = requests(current, self._config, seconds, names, further=further)
        self._exchange.send(messages)
        self._until |= dict.fromkeys(messages, self._clock.now() + seconds)

    def receive(self, deadline: float) -> tuple[Call, Message] | None:
        """Return the next answer with its site and round; see :meth:`Exchange.receive`."""
        return self._exchange.receive(deadline)

    def owed(self, call: Call) -> Asked | None:
        """Return, once, the request of an earlier round that an answer is to; None where none is kept."""
        return self._owed.pop(call, None)

    def end_round(self, current: Round, *, full: bool) -> None:
        """Forget the requests that nobody will wait for, and keep what checks the others.

        A site is at work until it answers, and is asked nothing else, for as long as its answer could count or the time
        that it was given is not over; then it is asked again, whatever it is at. Where late updates do not count, that
        is the end of a round that waited until its deadline; the sites that a full one went on without are at work
        still.

        Args:
            current: the round.
            full: whether it had all its updates.
        """
        federation, waiting, now = self._config.federation, self._exchange.under_way(), self._clock.now()
        if federation.carries:
            young = {call for call in waiting if current.number - call[1] < federation.max_staleness}
            kept = young | {call for call in waiting if now < self._until[call]}
        else:
            kept = waiting if full else set()
        self._exchange.forget(waiting - kept)
        self._until = {call: until for call, until in self._until.items() if call in kept}
        owed = {call: current.asked[call[0]] for call in kept if call[1] == current.number}
        self._owed = {call: asked for call, asked in self._owed.items() if call in kept} | owed
