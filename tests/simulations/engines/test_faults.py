"""Workers that die, and runs that do: nothing hangs, nothing is left behind, and what was lost is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.run_folder import RunFolder
from server.events import Observer
from server.federation import RunSettings, run_federation
from simulations.engines import ray_cluster
from simulations.engines.catalog import open_engine
from simulations.engines.engine import Answer, Request
from simulations.engines.frames import Frame, batch_frames, unpack
from simulations.engines.inprocess import InProcessEngine
from simulations.engines.processes import ProcessEngine
from simulations.engines.settings import EngineSettings, WorkerSettings
from simulations.engines.sharing import Cut, Sharing
from simulations.grid import VirtualGrid
from tests.simulations.engines.conftest import SITES, Bench, open_bench, train_requests

ROOT = Path(__file__).resolve().parents[3]
SOON_S = 60


def worker_settings(config_yaml: str) -> Callable[[int], WorkerSettings]:
    return lambda number: WorkerSettings(config_yaml, SITES, "cpu", 1, 30)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: Iterable[int], within_s: float = SOON_S) -> bool:
    """Wait until none of the processes lives; False after ``within_s``."""
    deadline = time.monotonic() + within_s
    left = set(pids)
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if alive(pid)}
        time.sleep(0.02)
    return not left


@pytest.fixture(scope="module")
def bench(config_of: Callable[[bool], RunConfig]) -> Iterator[Bench]:
    with open_bench(EngineSettings("processes", 1, 1), config_of(False)) as opened:
        yield opened


class KillWorker(Observer):
    """Kills the engine's first worker when the requests of a round go out."""

    def __init__(self, engine: ProcessEngine, number: int) -> None:
        self._engine, self._number = engine, number

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        if number == self._number:
            os.kill(self._engine.pids[0], signal.SIGKILL)


@pytest.mark.slow
def test_killed_worker_fails_its_site_alone_and_is_replaced(bench: Bench, tmp_path: Path) -> None:
    engine = bench.engine
    assert isinstance(engine, ProcessEngine)
    before = engine.pids
    settings = RunSettings(RunFolder(tmp_path / "run"), device="cpu")
    run_federation(VirtualGrid(engine, SITES), bench.config, settings, KillWorker(engine, 1))
    first, second = (record for record in RunFolder(tmp_path / "run").records() if record["kind"] == "round")
    lost = [site for site in first["sites"].values() if site["status"] == "failed"]
    assert [site["reason"] for site in lost] == ["Flower error 5: the node was lost, or died at work"]
    assert [site["status"] for site in first["sites"].values()].count("admitted") == SITES - 1
    assert {site["status"] for site in second["sites"].values()} == {"admitted"}
    assert engine.pids != before
    assert gone(before)


@pytest.mark.slow
def test_request_that_only_waited_at_a_killed_worker_is_answered(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ProcessEngine)
    bench.ask(train_requests(bench.config, 1))
    os.kill(engine.pids[0], signal.SIGKILL)
    answers = bench.ask(train_requests(bench.config, 4))
    failures = [answer.failure for answer in answers.values() if answer.failure is not None]
    assert failures == ["worker 1 was ended by SIGKILL"]


def test_worker_that_dies_before_it_is_ready_ends_the_run(config_of: Callable[[bool], RunConfig]) -> None:
    engine = ProcessEngine(2, worker_settings(dump_run_config(config_of(False))))
    try:
        pids = engine.pids
        os.kill(pids[1], signal.SIGKILL)
        engine.submit([Request(1, 0, "query", b"{}", b"")])
        with pytest.raises(RunError, match="worker 2 of 2 was ended by SIGKILL before it had loaded"):
            engine.collect()
    finally:
        engine.close()
    assert gone(pids)


@pytest.mark.slow
def test_worker_that_cannot_load_its_model_says_why() -> None:
    engine = ProcessEngine(1, worker_settings("name: tiny"))
    try:
        engine.submit([Request(1, 0, "query", b"{}", b"")])
        with pytest.raises(RunError, match=r"worker 1 of 1 could not start: .*model"):
            engine.collect()
    finally:
        engine.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_a_parent_that_is_killed(end: signal.Signals) -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "from simulations.engines.processes import ProcessEngine\n"
        "from simulations.engines.settings import WorkerSettings\n"
        "engine = ProcessEngine(2, lambda number: WorkerSettings('', 1, 'cpu', 1, 30))\n"
        "print(*engine.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        parent.send_signal(end)
        parent.wait(SOON_S)
    finally:
        parent.kill()
        parent.communicate()
    assert gone(pids)


def test_ray_that_is_absent_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, config_of: Callable[[bool], RunConfig]
) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr(ray_cluster.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[flower-simulation\]'"):
        open_engine(EngineSettings("ray", 1), config_of(False), SITES, "cpu")


class Batched:
    """A handler that takes up to three requests, echoes them in reverse order, and remembers its batches."""

    most = 3

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def handle(self, requests: Sequence[Request]) -> Iterator[Answer]:
        self.batches.append([request.ticket for request in requests])
        for request in reversed(requests):
            yield Answer(request.ticket, request.header, request.payload)


def test_handler_is_given_as_many_requests_as_it_takes() -> None:
    handler = Batched()
    engine = InProcessEngine(handler)
    requests = [Request(ticket, 0, "train", b"h", b"p") for ticket in range(1, 8)]
    assert Bench(engine, None).ask(requests).keys() == set(range(1, 8))  # type: ignore[arg-type]
    assert handler.batches == [[1, 4, 7], [2, 5], [3, 6]]


def test_next_batch_is_not_begun_before_the_last_one_is_taken() -> None:
    handler = Batched()
    engine = InProcessEngine(handler)
    engine.submit([Request(ticket, 0, "train", b"h", b"p") for ticket in range(1, 8)])
    assert [answer.ticket for _ in range(2) for answer in engine.collect()] == [7, 4]
    assert len(handler.batches) == 1


def request(ticket: int, node: int = 0) -> Request:
    return Request(ticket, node, "train", b"", b"")


def test_sharing_keeps_sites_together_and_lets_an_idle_worker_take_from_others() -> None:
    sharing = Sharing(2)
    sharing.add([request(1, 0), request(2, 2), request(3, 4), request(4, 1)])
    assert [known.ticket for known in sharing.batch(1)] == [4]
    assert [known.ticket for known in sharing.batch(1)] == [1]
    sharing.put_back(0, [[request(8)], [request(9)]])
    assert [known.ticket for _ in range(4) for known in sharing.batch(0)] == [8, 9, 2, 3]
    assert sharing.batch(0) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_are_the_same_for_any_number_of_workers(workers: int) -> None:
    sharing = Sharing(workers, Cut(most=4))
    sharing.add([request(ticket, ticket) for ticket in range(9)])
    found = [[known.ticket for known in sharing.batch(number % workers)] for number in range(4)]
    assert sorted(batch for batch in found if batch) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@given(
    work=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    most=st.integers(1, 9), multiple=st.sampled_from([1, 2, 4]), known=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_batches_hold_each_request_once_and_as_much_work_as_each_other(
    work: list[int], most: int, multiple: int, known: bool
) -> None:
    cut = Cut(most, multiple, work if known else ())
    batches = cut.batches([request(place, place) for place in range(len(work))])
    assert sorted(one.node for batch in batches for one in batch) == list(range(len(work)))
    assert all(batch == sorted(batch, key=lambda one: one.ticket) and 1 <= len(batch) <= most for batch in batches)
    fewest = -(-len(work) // most)
    assert fewest <= len(batches) < fewest + multiple
    assert len(batches) % multiple == 0 or len(batches) in (fewest, len(work) // 2) or most == 1
    if not known:
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
    elif max(map(len, batches)) < most:
        sums = [sum(work[one.node] for one in batch) for batch in batches]
        assert max(sums) - min(sums) <= max(work)


def test_the_last_batch_waits_for_a_worker_that_has_none() -> None:
    sharing = Sharing(2)
    sharing.add([request(ticket, 0) for ticket in range(3)])
    assert sharing.batch(0, held=0)
    assert sharing.batch(0, held=1)
    assert sharing.batch(0, held=1) == []
    assert [one.ticket for one in sharing.batch(1, held=0)] == [2]


@pytest.mark.parametrize("payload", [b"", b"x" * 1000])
def test_frames_survive_packing(payload: bytes) -> None:
    for what in (Request(7, 3, "query", b"header", payload), Answer(2**63, b"h", payload), Answer(1, failure="älter")):
        frame = unpack(Frame.of(what).pack())
        assert (frame.request() if isinstance(what, Request) else frame.answer()) == what
    assert [frame.ticket for frame in batch_frames([request(5), request(6)])] == [2, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_listens_on_the_loopback_address_alone_and_leaves_nothing() -> None:
    program = (
        "import json, os, psutil\n"
        "from simulations.engines.ray_cluster import RayCluster\n"
        "cluster = RayCluster(None, 1, 1)\n"
        "assert cluster.ray.get(cluster.ray.remote(lambda: os.getpid()).remote()) != os.getpid()\n"
        "family = psutil.Process().children(recursive=True)\n"
        "ports = [c for p in family for c in p.net_connections('inet') if c.status == 'LISTEN']\n"
        "print(json.dumps([[p.pid for p in family], [c.laddr.ip for c in ports]]), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, timeout=300, check=False, text=True
    )
    assert done.returncode == -signal.SIGKILL
    pids, listening = json.loads(done.stdout.splitlines()[-1])
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert gone(pids, 180)  # Ray's own agents take a minute to find out


def test_ray_imported_too_early_is_not_opened_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with pytest.raises(RunError, match="imported before"):
        ray_cluster.import_ray(alone=True)
