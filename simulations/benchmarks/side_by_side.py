"""Two whole runs at the same time, sharing one core: what a machine does to one it does to the other.

The speed of a machine that others use too changes by a tenth within minutes, between two runs and not within them. Two
processes that take turns of milliseconds on one core meet the same speed, and their CPU seconds compare. Their wall
seconds say nothing: each waits for the other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import torch

from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from common.quiet import quiet_dependencies
from simulations.benchmarks.measure import Seconds, seconds_of


def side_by_side(configs: Sequence[RunConfig]) -> list[Seconds]:
    """Run the configs at once, each in a process of one thread, all on one core; imports are not counted.

    Raises:
        RunError, ConfigError: as a run raises them.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in configs]
        for ready in [pool.submit(_prepare) for pool in pools]:
            ready.result()
        texts = map(dump_run_config, configs)
        running = [pool.submit(_run, text) for pool, text in zip(pools, texts, strict=True)]
        return [one.result() for one in running]


def _prepare() -> None:
    """Import what a run imports, late imports included, and go to the one core."""
    import client.dp.step  # noqa: F401 - a private run would import it, and Opacus, while the clock runs
    import simulations.benchmarks.harness  # noqa: F401

    quiet_dependencies()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _run(text: str) -> Seconds:
    from simulations.benchmarks.harness import run_fedtune

    config = parse_run_config(text, "benchmark", None)
    return seconds_of(lambda: run_fedtune(config))
