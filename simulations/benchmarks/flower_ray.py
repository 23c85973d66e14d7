"""The same work on Flower's own simulation (Ray), with a ClientApp as Flower's FlowerTune templates write it.

::

    python -m simulations.benchmarks.flower_ray CONFIG.yaml [--cached] [--workers 2]

prints one line of JSON, see :class:`FlowerRun`. The ClientApp of FlowerTune loads base model and data anew for every
message; with ``--cached`` a process keeps both. A site takes the local steps of the run config, in the same order of
rows, each batch padded to its longest row, and sends its whole adapter; the coordinator is Flower's FedAvg. So the work
is that of :func:`simulations.benchmarks.harness.run_plain_loop`, message by message.

:func:`flower_seconds` runs it in a process of its own, so that Ray ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from common.errors import RunError

LIMIT_S = 3600.0
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # where it is off, Ray listens on the loopback address alone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@dataclass(frozen=True)
class FlowerRun:
    """Seconds of a run on Flower's simulation.

    Attributes:
        wall_s: from the call of Flower's simulation to its return, its start included, imports not.
        first_round_s: the part until the first round was complete: start of Ray and of its actors, and one round.
        cpu_s: CPU seconds in that time of all its processes: driver, Ray's services and actors.
        messages: training messages answered.
        loss: mean training loss of the last round.
    """

    wall_s: float
    first_round_s: float
    cpu_s: float
    messages: int
    loss: float


def flower_seconds(config: RunConfig, *, cached: bool, workers: int = 2) -> FlowerRun:
    """Run ``config`` on Flower's simulation in a process of its own and return what it took.

    Args:
        config: a run config without DP.
        cached: whether a process keeps model and data between messages.
        workers: Ray actors, one core each.

    Raises:
        RunError: if that process fails, or takes longer than an hour.
    """
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_run_config(config), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(path), "--workers", str(workers)]
        command += ["--cached"] if cached else []
        env = {**os.environ, **_ENVIRONMENT, "RAY_TMPDIR": folder, "FLWR_HOME": folder}
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            out, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"Flower's simulation took more than {LIMIT_S:g} s; expected less.") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        raise RunError(f"Flower's simulation ended with status {process.returncode} ({last[:200]}); expected 0.")
    return FlowerRun(**json.loads(out.splitlines()[-1]))


def _run(config: RunConfig, cached: bool, workers: int) -> FlowerRun:
    from flwr.app import ArrayRecord, Context, MetricRecord
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from common.data.federated import load_federated_data
    from common.models.adapter import initial_adapter
    from simulations.benchmarks.flower_client import client_app, load_model

    sites = load_federated_data(config.data, config.seed).sites
    first = initial_adapter(load_model(config), config.seed)
    seen: dict[str, Any] = {"messages": 0, "loss": float("nan"), "first": None}
    server = ServerApp()

    class Counting(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
            answered = [reply for reply in replies if reply.has_content()]
            seen["messages"] += len(answered)
            seen["first"] = seen["first"] or time.perf_counter()
            arrays, metrics = super().aggregate_train(server_round, answered)
            seen["loss"] = float(metrics["train_loss"]) if metrics is not None else float("nan")  # type: ignore[arg-type]
            return arrays, metrics

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = len(sites) if config.federation.sites_per_round is None else config.federation.sites_per_round
        strategy = Counting(
            fraction_train=nodes / len(sites), fraction_evaluate=0.0, min_train_nodes=nodes,
            min_available_nodes=len(sites), weighted_by_key="num-examples",
        )  # fmt: skip
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(dict(first)), num_rounds=config.federation.rounds, timeout=LIMIT_S
        )
        seen["cpu"] = _family_cpu_seconds()  # Ray's processes are still there

    backend: Any = {
        "init_args": {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"},
        "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
    }
    cpu, began = _family_cpu_seconds(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(server, client_app(dump_run_config(config), cached), len(sites), backend_config=backend)
    ended = time.perf_counter()
    wanted = config.federation.rounds * (config.federation.sites_per_round or len(sites))
    if seen["messages"] != wanted:
        raise RunError(f"{seen['messages']} of {wanted} messages were answered; expected all. See Flower's log.")
    return FlowerRun(ended - began, seen["first"] - began, seen["cpu"] - cpu, seen["messages"], seen["loss"])


def _family_cpu_seconds() -> float:
    """CPU seconds so far of this process and of those below it that are alive."""
    import psutil

    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main(
    config: Path,
    cached: Annotated[bool, typer.Option("--cached")] = False,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Run a config on Flower's simulation and print its seconds as JSON."""
    from common.quiet import quiet_dependencies

    os.environ.update(_ENVIRONMENT)
    quiet_dependencies()
    print(json.dumps(asdict(_run(load_run_config(config, []), cached, workers))))


if __name__ == "__main__":
    typer.run(main)
