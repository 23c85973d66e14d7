"""The handler that trains several virtual sites at once; what it cannot join goes to another handler, one by one.

Each request goes through the site's own checks and gets the site's own reply, as the ClientApp would give it; only
the training between the two is shared. Alone go descriptions, a single request, sites whose training cannot be joined,
and, where the joint pass itself fails (memory, as a rule), all that were in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from client.answers import Assignment, prepare_train, reply_train
from client.refusals import log_line, refusal_of
from client.site import virtual_site
from client.training.site_round import LocalResult
from common.config.run import RunConfig
from common.models.adapter import AdaptedModel
from common.models.resident import resident_model
from common.wire import header_bytes
from simulations.cache import virtual_node
from simulations.cohort.training import can_train_together, most_sites, train_together
from simulations.engines.engine import Answer, Handler, Request

logger = logging.getLogger(__name__)


class CohortHandler:
    """Answers train requests together.

    Args:
        alone: answers whatever is not joined.
        config: the run config.
        nodes: number of virtual sites.
        device: to compute on.
        most: most sites that are trained at once.
        node: further entries of every node's config.
    """

    def __init__(
        self, alone: Handler, config: RunConfig, nodes: int, device: str, most: int,
        node: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._alone, self._config, self._nodes, self._device = alone, config, nodes, device
        self._node = dict(node or {})
        self.most = most

    def handle(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield one answer to each request: those that go alone first, as they are done."""
        training = [request for request in requests if request.kind == "train"]
        if len(training) < 2:
            yield from self._alone.handle(requests)
            return
        yield from self._one_by_one([request for request in requests if request.kind != "train"])
        model = resident_model(self._config, self._device)
        assigned: list[tuple[Request, Assignment]] = []
        for request in training:
            try:
                assigned.append((request, self._prepared(request, model)))
            except Exception as error:  # noqa: BLE001 - as at the ClientApp: a refusal, of this site alone
                yield _refusal(request, error)
        most = most_sites(model, assigned[0][1].names) if assigned else 1
        for start in range(0, len(assigned), most):
            yield from self._trained(assigned[start : start + most], model)

    def _prepared(self, request: Request, model: AdaptedModel) -> Assignment:
        node = {**virtual_node(request.node, self._nodes), **self._node}
        site = virtual_site(self._config, node, model)
        return prepare_train(request.header, request.payload, site, self._config, model)

    def _trained(self, assigned: Sequence[tuple[Request, Assignment]], model: AdaptedModel) -> Iterator[Answer]:
        requests = [request for request, _ in assigned]
        if len(assigned) < 2 or not can_train_together(model, self._config, assigned[0][1].names):
            yield from self._one_by_one(requests)
            return
        try:
            results = train_together(model, self._config, [each for _, each in assigned])
        except Exception as error:  # noqa: BLE001 - one site's rows may be the cause, and then fail alone
            logger.warning("%d sites are trained one by one: %s", len(requests), log_line(error))
            yield from self._one_by_one(requests)
            return
        for (request, each), result in zip(assigned, results, strict=True):
            yield self._answer(request, each, result)

    def _answer(self, request: Request, assigned: Assignment, result: LocalResult | Exception) -> Answer:
        try:
            if isinstance(result, Exception):
                raise result
            reply, update = reply_train(assigned, result, self._config)
            return Answer(request.ticket, header_bytes(reply), update)
        except Exception as error:  # noqa: BLE001 - as at the ClientApp: a refusal, of this site alone
            return _refusal(request, error)

    def _one_by_one(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for request in requests:
            yield from self._alone.handle([request])


def _refusal(request: Request, error: Exception) -> Answer:
    logger.error("%s", log_line(error))
    return Answer(request.ticket, header_bytes(refusal_of(error)))
