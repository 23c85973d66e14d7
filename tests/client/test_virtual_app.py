"""The ClientApp on a simulated node: answered in the process itself, as Flower's simulation runtime wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.app
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.flower_records import from_records, to_records
from common.wire import DescribeRequest, Refusal, SiteDescription, header_bytes, parse_header


def described(config: RunConfig, node: dict[str, Any]) -> SiteDescription | Refusal:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    context = Context(
        run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={"config-yaml": dump_run_config(config)}
    )
    request = header_bytes(DescribeRequest(config_digest=config.digest()))
    message = Message(to_records(request), 1, "query", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    return parse_header(from_records(client.app.app(message, context).content)[0], SiteDescription)


def test_simulated_node_is_a_virtual_site(make_config: Callable[..., RunConfig]) -> None:
    found = described(make_config(), {"partition-id": 1, "num-partitions": 3, "device": "cpu"})
    assert isinstance(found, SiteDescription)
    assert (found.site, found.seeded) == ("site 1", True)


def test_simulated_node_beyond_the_sites_is_refused(make_config: Callable[..., RunConfig]) -> None:
    found = described(make_config(), {"partition-id": 1, "num-partitions": 4, "device": "cpu"})
    assert isinstance(found, Refusal)
    assert found.code == "config"
