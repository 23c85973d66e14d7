"""Replies are fetched each by itself: one whose upload stalls holds up no other reply, and no deadline.

A SuperNode announces a reply and then uploads its parts. Flower's grid fetches every reply that is announced before it
returns any, and waits for parts that are not there yet: until a slow site has sent them, or until the SuperLink gives
the upload of a dead one up, minutes later. Whoever announces a reply and sends nothing would stop every round so.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from flwr.app import Message
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.superlink.grid.http_grid import HttpGrid

from server.forwarding_grid import ForwardingGrid

logger = logging.getLogger(__name__)

PROMPT_S = 0.5
"""Seconds in which a reply that is there as a whole is fetched, as most are: so long one call waits for it."""


class DownloadingGrid(ForwardingGrid):
    """Passes everything on to Flower's grid, but returns replies as soon as each is whole.

    Args:
        grid: Flower's, of a deployed ServerApp.
    """

    def __init__(self, grid: HttpGrid) -> None:
        super().__init__(grid)
        self._http = grid
        self._lock = threading.Lock()
        self._whole: dict[str, Message] = {}
        self._fetching: dict[str, threading.Thread] = {}
        self._forgotten: set[str] = set()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to some messages that are here as a whole; the others are fetched on."""
        wanted = set(message_ids)
        asked = wanted - self._fetching.keys()
        if asked:
            client: Any = self._http._runtime_client
            response = client.PullMessages(PullAppMessagesRequest(message_ids=sorted(asked)))
            for reply, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                one = PullAppMessagesResponse(messages_list=[reply], message_object_trees=[tree])
                self._begin(reply.metadata.reply_to_message_id, one)
        deadline = time.monotonic() + PROMPT_S
        for answered in wanted & self._fetching.keys():
            self._fetching[answered].join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            here = sorted(wanted & self._whole.keys())
            for answered in here:
                del self._fetching[answered]
            return [self._whole.pop(answered) for answered in here]

    def forget(self, message_ids: Collection[str]) -> None:
        """Fetch no more of the replies to some messages, and drop what is here of them."""
        with self._lock:
            for answered in self._fetching.keys() & set(message_ids):
                self._forgotten.add(answered)
                self._whole.pop(answered, None)

    def forget_all(self) -> None:
        """Forget every reply, at the end: this process waits for the threads that fetch parts."""
        self.forget(list(self._fetching))

    def _begin(self, answered: str, response: PullAppMessagesResponse) -> None:
        arguments = (answered, response)
        self._fetching[answered] = threading.Thread(target=self._fetch, args=arguments, daemon=True)
        self._fetching[answered].start()

    def _fetch(self, answered: str, response: PullAppMessagesResponse) -> None:
        """Have Flower's grid fetch the parts of a reply; one that cannot be had becomes Flower's error reply."""
        grid: Any = copy.copy(self._http)
        grid._client = _Announced(grid._runtime_client, response, lambda: answered in self._forgotten)
        try:
            messages = list(grid.pull_messages([answered]))
        except Exception as error:  # noqa: BLE001 - the site is late then, and the run goes on
            logger.warning("a reply could not be fetched: %s", type(error).__name__)
            return
        with self._lock:
            if answered not in self._forgotten:
                self._whole[answered] = messages[0]


class _Announced:
    """Flower's client, which knows what is announced, and fetches until that is forgotten."""

    def __init__(self, client: Any, response: PullAppMessagesResponse, is_forgotten: Callable[[], bool]) -> None:
        self._client, self._response, self._is_forgotten = client, response, is_forgotten

    def PullMessages(self, _request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        return self._response

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        if self._is_forgotten():
            raise ObjectPullError(request.object_id, "nobody waits for it any more")
        return self._client.PullObject(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


@contextlib.contextmanager
def downloading(grid: Grid) -> Iterator[Grid]:
    """Yield a grid that fetches replies apart; a grid in this process has them as they are announced."""
    if not isinstance(grid, HttpGrid):
        yield grid
        return
    apart = DownloadingGrid(grid)
    try:
        yield apart
    finally:
        apart.forget_all()
