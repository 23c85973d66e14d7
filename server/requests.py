"""The requests of a round as Flower's messages, and what Flower's errors on them mean."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, MessageType

from common.config.run import RunConfig
from common.flower_records import to_records
from server.rounds import Round
from server.transport import EXPIRES_AFTER_S

_ERRORS = {
    1: "the ClientApp could not be loaded",
    2: "the ClientApp raised",
    3: "the message expired, or its reply was not uploaded whole",
    4: "the reply expired",
    5: "the node was lost, or died at work",
    8: "the ClientApp crashed",
}
"""What Flower's codes mean. Its own texts may quote what a site's code said, so they are not recorded."""

Call = tuple[str, int]
"""Site and round of a request."""


def requests(
    current: Round, config: RunConfig, seconds: float, names: Iterable[str], *, further: bool = False
) -> dict[Call, Message]:
    """Return requests of a round.

    A request that nobody will wait for any more expires: a site that was away, or busy for long, would else train for
    all the rounds it has missed, and spend its budget on them.

    Args:
        current: the round.
        config: the run config.
        seconds: that a site has to answer: until the round's deadline, or where late updates count as long as that.
        names: of sites of its cohort.
        further: whether the round is on already, so that an extension is not yet to come.
    """
    federation = config.federation
    extension = federation.extension_s if federation.below_min == "extend" and not further else 0.0
    rounds = 1 + federation.max_staleness if federation.carries else 1
    return {
        (name, current.number): Message(
            to_records(*current.request(name)),
            current.cohort[name].node_id,
            MessageType.TRAIN,
            ttl=rounds * (seconds + extension) + EXPIRES_AFTER_S,
            group_id=str(current.number),
        )
        for name in names
    }


def failure(reply: Message) -> str:
    """Return what a reply that is Flower's error says."""
    code = reply.error.code
    return f"Flower error {code}: {_ERRORS.get(code, 'no known kind')}"
