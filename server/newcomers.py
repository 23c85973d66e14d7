"""Sites that connect while a run is on: asked between rounds what they are, and members from the next one on.

A round does not wait for their answers. So a site that was away when a run began, or when it was taken up again, comes
in by itself; one that refuses, as in the hours its policy keeps, is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import RunError, WireError
from common.wire import SiteDescription
from server.clock import POLL_S, Clock
from server.cohort import Member
from server.transport import Exchange, description_of, description_request

logger = logging.getLogger(__name__)

AGAIN_S, SELDOM_S = 60.0, 3600.0
"""Seconds until a site that did not come in is asked again: twice as long every time, up to the second."""

Admit = Callable[[Mapping[int, SiteDescription]], tuple[Mapping[str, Member], Mapping[int, str]]]
"""From descriptions by node id to members by name, and the reasons of the other nodes."""


@dataclass
class Newcomers:
    """Those who may still come in.

    Attributes:
        config: the run config.
        clock: what the time between two questions is read from.
        enrolled: names of all sites that may, by node id.
        admit: the checks of those who describe themselves.
    """

    config: RunConfig
    clock: Clock
    enrolled: Mapping[int, str]
    admit: Admit
    _asked: Exchange[int] | None = None
    _again: dict[int, tuple[float, float]] = field(default_factory=dict)

    def come(self, grid: Grid, members: Collection[str]) -> dict[str, Member]:
        """Return the sites that have come in since, and ask those that are connected now.

        Args:
            grid: what carries the messages.
            members: names of the sites that take part.
        """
        asked = self._asked = self._asked or Exchange(grid, self.clock)
        described: dict[int, SiteDescription] = {}
        while (arrived := asked.receive(self.clock.now() + POLL_S)) is not None:
            node, reply = arrived
            try:
                described[node] = description_of(reply)
            except (RunError, WireError) as error:
                logger.warning("node %d does not come in: %s", node, error)
        come, unfit = self.admit(described)
        for member in come.values():
            self._again.pop(member.node_id, None)  # should it change, it is asked anew at once
        for node, reason in unfit.items():
            logger.warning("node %d does not come in: %s", node, reason)
        away = {node for node, name in self.enrolled.items() if name not in members and name not in come}
        connected = away & {*grid.get_node_ids()} if away else set()
        due = [node for node in sorted(connected - asked.under_way()) if self._is_due(node)]
        asked.send({node: description_request(node, self.config) for node in due})
        return dict(come)

    def _is_due(self, node: int) -> bool:
        """Whether to ask a node now, and if so, remember when to ask it again."""
        due, pause = self._again.get(node, (self.clock.now(), AGAIN_S))
        if self.clock.now() < due:
            return False
        self._again[node] = (self.clock.now() + pause, min(2 * pause, SELDOM_S))
        return True
