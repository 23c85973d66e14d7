"""The app bundle on Flower's own simulation runtime: what ships in it, and that it gives what this process gives."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import server.app
from client.app import app as client_app
from common.config.load import parse_run_config
from common.errors import ConfigError
from common.quiet import quiet_dependencies
from server.flower_commands import stage_app
from simulations.engines.app_handler import AppHandler
from simulations.engines.inprocess import InProcessEngine
from simulations.grid import VirtualGrid
from simulations.run import simulate
from tests.conftest import config_text

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NOT_CODE = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "runs")
START_S, RUN_S, STOP_S = 60, 300, 8
SITES = 3
LOOPBACK = "127.0.0.1"
SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # where it is off, Ray listens on the loopback address alone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": LOOPBACK,
    "no_proxy": LOOPBACK,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree beside things that must stay at home."""
    folder = tmp_path_factory.mktemp("app") / "fedtune"
    shutil.copytree(ROOT, folder, ignore=NOT_CODE)
    for name in ("patients.jsonl", "client/patients.jsonl", "configs/README.md", "runs/a/config.yaml", "runs/a/b.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    env = {**os.environ, **SILENT, "FLWR_HOME": str(folder / "home")}
    subprocess.run([BIN / "flwr", "build", "--app", source], cwd=folder, env=env, check=True, capture_output=True)
    return next(folder.glob("*.fab"))


def test_bundle_lists_code_configs_and_licence_alone(source: Path, bundle: Path) -> None:
    code = [path for package in ("common", "client", "server") for path in (source / package).rglob("*.py")]
    wanted = [*code, *(source / "configs").glob("*.yaml"), *(source / name for name in ("README.md", "LICENSE"))]
    with zipfile.ZipFile(bundle) as archive:
        listed = set(archive.namelist())
    assert listed == {path.relative_to(source).as_posix() for path in wanted} | {"pyproject.toml", ".info/CONTENT"}


def test_coordinator_hands_over_what_the_bundle_of_the_whole_tree_holds(
    source: Path, bundle: Path, tmp_path: Path
) -> None:
    stage_app(source, tmp_path / "app")
    staged = {path.relative_to(tmp_path / "app").as_posix() for path in (tmp_path / "app").rglob("*") if path.is_file()}
    with zipfile.ZipFile(bundle) as archive:
        assert staged == set(archive.namelist()) - {".info/CONTENT"}


def test_bundle_is_below_the_limit_of_flower(bundle: Path) -> None:
    assert bundle.stat().st_size < 10_000_000


def test_server_app_failure_is_an_exception_which_flower_counts_as_failed(tmp_path: Path) -> None:
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"out": str(tmp_path)})
    with pytest.raises(ConfigError, match="neither"):
        server.app.app(VirtualGrid(InProcessEngine(AppHandler(client_app, SITES, {})), SITES), context)


@dataclass(frozen=True)
class Runtime:
    """A SuperLink of Flower's simulation runtime and the environment of commands to it."""

    source: Path
    env: dict[str, str]

    def flwr(self, *arguments: str | Path) -> str:
        """Run a ``flwr`` command in the app and return what it prints."""
        done = subprocess.run(
            [BIN / "flwr", *arguments],
            cwd=self.source, env=self.env, timeout=RUN_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def runtime(source: Path) -> Iterator[Runtime]:
    """A SuperLink on a free port of the loopback address; it and all that it started end with the fixture."""
    # Ray puts sockets into its folder: their paths must be short. Ray also looks for code in the working directory
    # before the bundle, so that directory is empty.
    with tempfile.TemporaryDirectory(prefix="flwr", ignore_cleanup_errors=True) as name:
        home, empty = Path(name), Path(name) / "empty"
        empty.mkdir()
        port = _free_port()
        config = {"superlink": {"local": {"address": f"{LOOPBACK}:{port}", "insecure": True}}}
        (home / "config.toml").write_text(tomli_w.dumps(config))
        env = {**os.environ, **SILENT, "FLWR_HOME": name, "RAY_TMPDIR": name}
        env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
        command = [BIN / "flower-superlink", "--simulation", "--insecure", "--host", LOOPBACK, "--port", str(port)]
        with (home / "superlink.log").open("wb") as log:
            superlink = subprocess.Popen(command, cwd=empty, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_listening(superlink, port, home / "superlink.log")
            yield Runtime(source, env)
        finally:
            _end(superlink)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((LOOPBACK, port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"flower-superlink did not start: {log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, which Flower puts into sessions of their own: ask the first, kill the rest."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=STOP_S)
        for member in left:
            member.kill()
        psutil.wait_procs(left, timeout=STOP_S)
    process.wait(STOP_S)


@pytest.fixture(scope="module", params=["none", "example"])
def runs(
    request: pytest.FixtureRequest,
    runtime: Runtime,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Run folders of one run config: from Flower's runtime, and from this process."""
    folder = tmp_path_factory.mktemp("runs")
    private = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5, "sample_rate": 0.5}
    privacy = {"unit": request.param, **(private if request.param == "example" else {})}
    text = config_text(folder, tiny_models["bert"], privacy=privacy, federation={"rounds": 2, "min_sites": SITES})
    run_config = folder / "run.toml"
    run_config.write_text(
        tomli_w.dumps({"config-yaml": text, "out": str(folder / "flower")}, multiline_strings=True), encoding="utf-8"
    )
    nodes = f"num-supernodes={SITES} client-resources-num-cpus=1 init-args-num-cpus=1"
    log = runtime.flwr("run", ".", "local", "--stream", "--federation-config", nodes, "--run-config", run_config)
    known = json.loads(runtime.flwr("ls", "local", "--format", "json"))["runs"]
    assert {run["status"] for run in known} == {"finished:completed"}, log
    quiet_dependencies()
    simulate(parse_run_config(text, "test", None), folder / "here", device="cpu")
    return folder / "flower", folder / "here"


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _numbers(values: Any, path: str = "") -> dict[str, Any]:
    """Nested figures as one flat dict."""
    if not isinstance(values, dict):
        return {path: values}
    return {key: leaf for name in values for key, leaf in _numbers(values[name], f"{path}/{name}").items()}


@pytest.mark.slow
class TestFlowerRuntime:
    def test_flower_runtime_trains_the_same_adapter(self, runs: tuple[Path, Path]) -> None:
        flower, here = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in runs)
        torch.testing.assert_close(flower, here, atol=1e-5, rtol=0)

    def test_flower_runtime_measures_the_same(self, runs: tuple[Path, Path]) -> None:
        keys = ("metrics_before", "metrics_after", "epsilon")
        flower, here = (_numbers({key: _summary(folder)[key] for key in keys}) for folder in runs)
        assert flower == pytest.approx(here, abs=1e-4)

    def test_flower_runtime_claims_the_same(self, runs: tuple[Path, Path]) -> None:
        flower, here = (_summary(folder) for folder in runs)
        assert flower["privacy_claim"] == here["privacy_claim"]

    def test_flower_runtime_moves_the_adapter(self, runs: tuple[Path, Path]) -> None:
        before, after = (
            _summary(runs[0])[key]["test"]["overall"]["loss"] for key in ("metrics_before", "metrics_after")
        )
        assert before != after
