"""The plain loop with one process a core: sites are shared out once, each process loads the model once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from common.tensors import Tensors
from simulations.benchmarks.harness import PlainSites

_OWN: dict[str, PlainSites] = {}
"""The sites of a worker process, under one key."""


def run_plain_processes(config: RunConfig, processes: int) -> Tensors:
    """Do a run's local steps in ``processes`` processes of one thread and return the averaged adapter."""
    text, spawn = dump_run_config(config), multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(processes)]
        started = [pool.submit(_start, text) for pool in pools]
        sizes, first = started[0].result()
        shares = shared_out(sizes, processes)
        adapter = {name: torch.from_numpy(value) for name, value in first.items()}
        for number in range(1, config.federation.rounds + 1):
            plain = {name: value.numpy() for name, value in adapter.items()}
            parts = [
                pool.submit(_round, number, plain, share).result
                for pool, share in zip(pools, shares, strict=True)
                if share
            ]
            done = [part() for part in parts]
            adapter = {name: torch.from_numpy(sum(part[name] for part in done)) for name in adapter}
    return adapter


def shared_out(sizes: Mapping[str, int], processes: int) -> list[list[str]]:
    """Deal sites to processes so that they end together: the largest first, each to who has the fewest rows."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    rows = [0] * processes
    for site in sorted(sizes, key=lambda site: (-sizes[site], site)):
        least = rows.index(min(rows))
        shares[least].append(site)
        rows[least] += sizes[site]
    return shares


def _start(config_yaml: str) -> tuple[dict[str, int], dict[str, Any]]:
    torch.set_num_threads(1)
    own = _OWN["sites"] = PlainSites(parse_run_config(config_yaml, "benchmark", None))
    return {site: len(rows) for site, rows in own.rows.items()}, {n: v.numpy() for n, v in own.first().items()}


def _round(number: int, adapter: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
    start = {name: torch.from_numpy(value) for name, value in adapter.items()}
    return {name: value.numpy() for name, value in _OWN["sites"].add_round(number, start, sites).items()}
