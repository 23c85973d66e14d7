"""Requests that are answered together get each site's own answer, behind every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.site import Site
from common.codecs.codec import decode
from common.config.load import parse_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.models import resident
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import l2_norm, manifest_of, subtract
from common.wire import DescribeRequest, Refusal, SiteDescription, TrainReply, header_bytes, parse_header
from simulations.cohort.size import cohort_size
from simulations.engines.engine import Answer, Request
from simulations.engines.settings import EngineSettings, asked_cohort
from simulations.run import simulate
from tests.conftest import config_text
from tests.simulations.engines.conftest import PRIVATE, open_bench, train_requests

TINY = {"rank": 2, "alpha": 4}
SGD = {"optimizer": "sgd", "lr": 0.02, "batch_size": 4}


@pytest.fixture(params=[False, True], ids=["plain", "DP"])
def config(request: pytest.FixtureRequest, tmp_path: Path, tiny_models: dict[str, Path]) -> RunConfig:
    privacy: dict[str, Any] = PRIVATE if request.param else {"unit": "none"}
    text = config_text(tmp_path, tiny_models["bert"], privacy=privacy, adapter=TINY, training=SGD)
    return parse_run_config(text, "test", None)


def answers_of(config: RunConfig, requests: list[Request], settings: EngineSettings) -> list[Answer]:
    with open_bench(settings, config) as opened:
        found = opened.ask(requests)
    return [found[request.ticket] for request in requests]


def expect_close(config: RunConfig, found: Answer, expected: Answer) -> None:
    ours, theirs = (parse_header(each.header, TrainReply) for each in (found, expected))
    assert isinstance(ours, TrainReply)
    assert isinstance(theirs, TrainReply)
    loss = None if theirs.train_loss is None else pytest.approx(theirs.train_loss, rel=1e-5)
    assert ours.model_dump() == theirs.model_dump() | {"train_loss": loss}
    manifest = manifest_of(initial_adapter(resident_model(config, "cpu"), config.seed))
    update, alone = (decode(each.payload, manifest, config.communication.codec) for each in (found, expected))
    assert l2_norm(subtract(update, alone)) < 1e-5 * l2_norm(alone)


def test_answers_are_those_of_the_client_app_whatever_comes_between(config: RunConfig) -> None:
    requests = train_requests(config, 9)
    header = header_bytes(DescribeRequest(config_digest=config.digest()))
    requests[2] = replace(requests[2], header=b"not a header")
    requests[4] = replace(requests[4], kind="query", header=header)
    requests[7] = replace(requests[7], payload=requests[7].payload[:-8])
    alone, together = (answers_of(config, requests, EngineSettings(cohort=size)) for size in (1, 5))
    for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
        if number in (2, 4, 7):
            assert found == expected
            expected_kind = SiteDescription if number == 4 else Refusal
            assert isinstance(parse_header(found.header, SiteDescription), expected_kind)
        else:
            expect_close(config, found, expected)


def test_site_whose_rows_fail_the_joint_pass_fails_alone(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = train_requests(config, 3)
    alone = answers_of(config, requests, EngineSettings(cohort=1))
    from simulations.cohort import handler

    virtual_site = handler.virtual_site

    def broken(run: RunConfig, node: dict[str, object], model: Any) -> Site:
        site: Site = virtual_site(run, node, model)
        if node["partition-id"] != 1:
            return site
        beyond = tuple(replace(row, input_ids=row.input_ids + 10_000) for row in site.rows)
        return replace(site, rows=beyond)

    for module in ("simulations.cohort.handler", "client.virtual_app"):
        monkeypatch.setattr(f"{module}.virtual_site", broken)
    with caplog.at_level(logging.WARNING):
        found = answers_of(config, requests, EngineSettings(cohort=3))
    assert "3 sites are trained one by one" in caplog.text
    assert isinstance(parse_header(found[1].header, TrainReply), Refusal)
    assert (found[0].payload, found[2].payload) == (alone[0].payload, alone[2].payload)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_bits_of_a_cohort_do_not_depend_on_engine_or_workers(config: RunConfig) -> None:
    requests = train_requests(config, 9)
    here = answers_of(config, requests, EngineSettings(cohort=2))
    assert answers_of(config, requests, EngineSettings("processes", 2, 1, cohort=2)) == here


def test_run_of_cohorts_ends_on_the_adapter_of_one_by_one(config: RunConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapters, engines = [], []
    for size in (1, 2):
        folder = tmp_path / f"run {size}"
        summary = simulate(config, folder, device="cpu", engine=EngineSettings(cohort=size))
        adapters.append(load_file(RunFolder(folder).adapter / "adapter_model.safetensors"))
        engines.append(summary["engine"])
    assert engines == ["inprocess", "inprocess, cohorts of 2"]
    assert l2_norm(subtract(adapters[1], adapters[0])) < 1e-6 * l2_norm(adapters[0])


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_cohort_trains_on_the_correction_that_it_received(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    from safetensors.torch import load_file

    config = make_config(
        aggregation={"method": method, "weights": "uniform"}, adapter=TINY, training={**SGD, "lr": 0.5},
        evaluation={"enabled": False}, federation={"rounds": 3},
    )  # fmt: skip
    settings = {
        "alone": EngineSettings(cohort=1),
        "together": EngineSettings(cohort=3),
        "in workers": EngineSettings("processes", 2, 1, cohort=3),
    }
    ended = {}
    for name, engine in settings.items():
        resident.clear()
        folder = tmp_path / name
        simulate(config, folder, device="cpu", engine=engine)
        ended[name] = load_file(RunFolder(folder).adapter / "adapter_model.safetensors")
    assert l2_norm(subtract(ended["together"], ended["alone"])) < 1e-4 * l2_norm(ended["alone"])
    assert l2_norm(subtract(ended["in workers"], ended["together"])) == 0.0


@pytest.mark.parametrize(
    ("sections", "size"),
    [
        ({}, 8),
        ({"training": {"batch_size": 100}}, 1),
        ({"training": {"micro_batch_size": 4}}, 1),
        ({"adapter": {"dropout": 0.1}}, 1),
        ({"adapter": {"kind": "head_only"}}, 1),
    ],
)
def test_auto_joins_small_steps_on_a_cpu(
    make_config: Callable[..., RunConfig], sections: dict[str, Any], size: int
) -> None:
    config = make_config(**sections)
    assert cohort_size(None, config, "cpu") == size
    assert cohort_size(3, config, "cpu") == 3


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_cohort_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number of sites from 1, or auto"):
        asked_cohort(text)
    assert (asked_cohort("auto"), asked_cohort("12")) == (None, 12)
    with pytest.raises(ConfigError, match="--cohort is 0"):
        EngineSettings(cohort=0)
