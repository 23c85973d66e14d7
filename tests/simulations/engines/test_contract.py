"""The contract of every engine, and that none changes a bit of what comes out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from common.config.run import RunConfig
from common.errors import ConfigError
from common.run_folder import RunFolder
from common.wire import DescribeRequest, SiteDescription, TrainReply, header_bytes, parse_header
from server.federation import RunSettings, run_federation
from simulations.engines.catalog import ENGINES, open_engine
from simulations.engines.engine import Answer, Request
from simulations.engines.processes import ProcessEngine
from simulations.engines.settings import EngineSettings, cores
from simulations.grid import VirtualGrid
from tests.simulations.engines.conftest import RAY_MARKS, SITES, TICKETS, Bench, open_bench, train_requests

CASES = {
    "inprocess": (EngineSettings(), False),
    "inprocess, DP": (EngineSettings(), True),
    "processes, 1 worker": (EngineSettings("processes", 1, 1), False),
    "processes, 2 workers": (EngineSettings("processes", 2, 1), False),
    "processes, 1 worker, DP": (EngineSettings("processes", 1, 1), True),
    "processes, 2 workers, DP": (EngineSettings("processes", 2, 1), True),
    "ray, 2 workers, DP": (EngineSettings("ray", 2, 1), True),
}
SLOW = pytest.mark.slow


MARKS = {"inprocess": (), "processes": (SLOW,), "ray": RAY_MARKS}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=MARKS[settings.name]) for name, (settings, _) in CASES.items()]
)
def bench(request: pytest.FixtureRequest, config_of: Callable[[bool], RunConfig]) -> Iterator[Bench]:
    """Each engine with one config, open for all tests of this module."""
    settings, private = CASES[request.param]
    with open_bench(settings, config_of(private)) as opened:
        yield opened
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def expected(config_of: Callable[[bool], RunConfig]) -> dict[bool, list[Answer]]:
    """What each of nine requests is answered in this process, without and with DP."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of tests/conftest.py, whose filter is not yet there for a module
        for private in (False, True):
            config = config_of(private)
            requests = train_requests(config, 9)
            with open_bench(EngineSettings(), config) as opened:
                answers = opened.ask(requests)
            found[private] = [answers[request.ticket] for request in requests]
    return found


def test_answers_are_the_same_bytes_whoever_computes_them(bench: Bench, expected: dict[bool, list[Answer]]) -> None:
    requests = train_requests(bench.config, 9)
    answers = bench.ask(requests)
    for request, known in zip(requests, expected[bench.config.privacy.is_local], strict=True):
        assert answers[request.ticket] == replace(known, ticket=request.ticket)
        assert isinstance(parse_header(known.header, TrainReply), TrainReply)
    assert len({answer.payload for answer in answers.values()}) > 1


def test_every_site_describes_itself_under_its_own_name(bench: Bench) -> None:
    header = header_bytes(DescribeRequest(config_digest=bench.config.digest()))
    requests = [Request(next(TICKETS), node, "query", header, b"") for node in range(SITES)]
    answers = bench.ask(requests)
    described = [parse_header(answers[request.ticket].header, SiteDescription) for request in requests]
    assert [known.site for known in described if isinstance(known, SiteDescription)] == ["site 0", "site 1", "site 2"]


def test_nothing_is_collected_where_nothing_is_outstanding(bench: Bench) -> None:
    assert bench.engine.collect() == []
    bench.ask(train_requests(bench.config, 1))
    assert bench.engine.collect() == []


def test_requests_may_be_added_while_others_are_outstanding(bench: Bench) -> None:
    first, second = train_requests(bench.config, 3), train_requests(bench.config, 4)
    bench.engine.submit(first)
    early = bench.engine.collect()
    late = bench.ask_more(second, outstanding=len(first) - len(early))
    assert {answer.ticket for answer in early} | late.keys() == {r.ticket for r in [*first, *second]}


def test_site_that_refuses_answers_with_a_refusal(bench: Bench) -> None:
    request = Request(next(TICKETS), 0, "train", b"not a header", b"")
    answer = bench.ask([request])[request.ticket]
    assert b"refusal" in answer.header
    assert answer.failure is None


def test_run_ends_on_the_same_adapter(bench: Bench, config_of: Callable[[bool], RunConfig], tmp_path: Path) -> None:
    here = open_engine(EngineSettings(), bench.config, SITES, "cpu")
    for name, engine in (("here", here), ("there", bench.engine)):
        settings = RunSettings(RunFolder(tmp_path / name), device="cpu")
        run_federation(VirtualGrid(engine, SITES), bench.config, settings)
    ours, theirs = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("here", "there"))
    assert ours.read_bytes() == theirs.read_bytes()
    last = RunFolder(tmp_path / "there").records()
    rounds = [record for record in last if record["kind"] == "round"]
    assert {site["status"] for record in rounds for site in record["sites"].values()} == {"admitted"}


@SLOW
def test_workers_share_the_pages_of_the_base_model(bench: Bench) -> None:
    if not isinstance(bench.engine, ProcessEngine):
        pytest.skip("the engine has no worker processes of this machine")
    weights = str(Path(bench.config.model.source) / "model.safetensors")
    bench.ask(train_requests(bench.config, 6))
    for pid in bench.engine.pids:
        maps = [entry for entry in psutil.Process(pid).memory_maps(grouped=False) if entry.path == weights]
        assert maps, "the weights were copied"
        assert all(entry.private_dirty == 0 for entry in maps)


def test_closed_twice_is_closed(config_of: Callable[[bool], RunConfig]) -> None:
    for name in ("inprocess", "processes"):
        engine = open_engine(EngineSettings(name), config_of(False), SITES, "cpu")
        engine.close()
        engine.close()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"name": "threads"}, "expected one of inprocess, processes, ray"),
        ({"workers": 2}, "Choose --engine processes"),
        ({"name": "processes", "workers": 0}, "expected at least 1"),
        ({"name": "processes", "threads": 0}, "--threads is 0"),
        ({"name": "processes", "address": "10.0.0.1:6379"}, "Set --engine ray"),
    ],
)
def test_wrong_settings_are_refused(
    arguments: dict[str, object], rule: str, config_of: Callable[[bool], RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=rule):
        open_engine(EngineSettings(**arguments), config_of(False), SITES)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_workers_and_their_threads_fit_the_cores(workers: int) -> None:
    each = EngineSettings("processes", workers).threads_each
    assert each == 1 or workers * each <= cores()
    assert EngineSettings("processes", workers, 5).threads_each == 5


def test_every_engine_of_the_catalog_is_held_to_the_contract() -> None:
    assert {settings.name for settings, _ in CASES.values()} == set(ENGINES)
