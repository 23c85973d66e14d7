"""The parts of the benchmark table. Each yields its lines as they are measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from common.config.load import load_run_config
from common.config.run import RunConfig
from common.data.tokens import load_federated_tokens
from common.methods import METHODS
from common.models import resident
from common.models.resident import resident_model
from server.events import Observer
from simulations.benchmarks.agent_hop import agent_hop
from simulations.benchmarks.aggregation import DENSE, in_child
from simulations.benchmarks.deployed_round import deployed_round
from simulations.benchmarks.dp import CASES, case_config, dp_figures
from simulations.benchmarks.idle import idle_round
from simulations.benchmarks.limit import arithmetic_of, matrix_rate
from simulations.benchmarks.lines import Line, compared, of_measurements, slower
from simulations.benchmarks.measure import Seconds, cpu_seconds, in_pairs, in_turns
from simulations.benchmarks.scale import compare_scale
from simulations.benchmarks.side_by_side import side_by_side
from simulations.benchmarks.sides import Limit, Sides
from simulations.benchmarks.step_work import StepWork, with_overrides
from simulations.benchmarks.works import ROOT, Extent, private_sites, real_sites, virtual_sites
from simulations.run import simulate

Lines = Iterator[Line]


def real_part(extent: Extent) -> Lines:
    """(a): real sites against the bare loop and Flower's simulation."""
    yield from run_lines("real", "(a)", real_sites(extent), extent, target=0.65, flower=(1.6, 1.6))


def virtual_part(extent: Extent) -> Lines:
    """(b): small virtual sites against the bare loop and Flower's simulation."""
    yield from run_lines("virtual", "(b)", virtual_sites(extent), extent, target=0.6, flower=(3.0, 2.3))


def run_lines(
    part: str, name: str, config: RunConfig, extent: Extent, target: float, flower: tuple[float, float]
) -> Lines:
    """Yield the lines of a work: in one process, in several, and against Flower's simulation.

    Args:
        part: key of the part.
        name: of the work.
        config: its run config.
        extent: how much is measured.
        target: most that ours may take of the bare loop.
        flower: least that Flower's simulation is to take of ours, with a fresh and with a cached model.
    """
    sides, limit = Sides(config, extent.workers), Limit(config)
    alone = in_turns({"ours": sides.ours, "limit": limit.seconds, "bare": sides.bare}, extent.pairs)
    limits = [one.cpu for one in alone["limit"]]
    line = compared(part, f"{name} ours / bare loop, 1 process", alone["ours"], alone["bare"], f"<= {target:g}")
    yield line.against_limit(alone["ours"], alone["bare"], limits)
    yield _distance(part, f"{name} adapters of both, relative distance", sides.distance("ours", "bare"))
    resident.clear()
    shared = in_turns({"ours": sides.ours_shared, "bare": sides.bare_shared}, extent.pairs)
    flowers = in_turns({"fresh": sides.flower, "cached": sides.flower_cached}, 1)
    many = f"{extent.workers} processes"
    line = compared(part, f"{name} ours / bare loop, {many}", shared["ours"], shared["bare"], f"<= {target:g}")
    yield line.against_limit(shared["ours"], shared["bare"], limits)
    yield _distance(part, f"{name} adapters of both, {many}", sides.distance("ours_shared", "bare_shared"))
    for kind, least in zip(("fresh", "cached"), flower, strict=True):
        label = f"{name} Flower's simulation, {kind} model / ours, {many}"
        yield slower(part, label, shared["ours"][-1:], flowers[kind], f">= {least:g}")


def _distance(part: str, name: str, distance: float) -> Line:
    return Line(part, name, distance, unit="of the norm", target="float rounding")


def private_part(extent: Extent) -> Lines:
    """(c): real sites with example-level DP over the same without, side by side: CPU seconds."""
    plain = real_sites(extent)
    private = private_sites(plain)
    found = [side_by_side([private, plain]) for _ in range(extent.pairs)]
    ours, base = ([pair[side].cpu for pair in found] for side in (0, 1))
    ratio = median(one / other for one, other in zip(ours, base, strict=True))
    yield Line(
        "private", "(c) ours with DP / without, side by side", median(ours), median(base), ratio, ratio, "s of CPU",
        "<= 1.1", pairs=extent.pairs,
    )  # fmt: skip


class _FirstRound(Observer):
    """Notes when the first round begins."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        if number == 1:
            self.wall, self.cpu = time.perf_counter(), cpu_seconds()


def start_part(extent: Extent) -> Lines:
    """Start-up of (a) beyond imports, until the first round's requests go out."""
    config = with_overrides(real_sites(extent), ["federation.rounds=1", "data.max_rows_per_site=16"])
    whole = with_overrides(real_sites(extent), ["federation.rounds=1"])
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, {"FEDTUNE_CACHE": str(Path(name) / "cache")}):
        _start_up(config, Path(name) / "first")  # the first run of a process also imports what is imported late
        cold, warm = [], []
        for turn in range(extent.steps):
            with patch.dict(os.environ, {"FEDTUNE_CACHE": str(Path(name) / f"cache{turn}")}):
                cold.append(_start_up(whole, Path(name) / f"cold{turn}"))
                warm.append(_start_up(whole, Path(name) / f"warm{turn}"))
    for label, found in (("rows tokenised before", warm), ("rows not tokenised before", cold)):
        wall, cpu = median(one.wall for one in found), median(one.cpu for one in found)
        text = f"start-up beyond imports, {label} ({cpu:.2f} s of CPU)"
        yield Line("start", text, wall, target="< 1 s", pairs=len(found))


class _StartedError(Exception):
    """The first round begins: nothing more is to be measured."""


class _StopAtFirstRound(_FirstRound):
    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        super().round_started(number, cohort)
        raise _StartedError


def _start_up(config: RunConfig, folder: Path) -> Seconds:
    load_federated_tokens.cache_clear()
    resident.clear()
    seen = _StopAtFirstRound()
    wall, cpu = time.perf_counter(), cpu_seconds()
    with suppress(_StartedError):
        simulate(config, folder, observer=seen)
    return Seconds(seen.wall - wall, seen.cpu - cpu)


def idle_part(extent: Extent) -> Lines:
    """(d): a round of idle sites."""
    found = idle_round(extent.idle_sites)
    name = f"(d) a round of {found.sites} idle sites x 1 MB ({found.cpu_s:.2f} s of CPU)"
    yield Line("idle", name, found.wall_s, target="< 1 s", pairs=5)


def agent_part(extent: Extent) -> Lines:
    """(h): 20 MB to a site's agent and back."""
    found = agent_hop()
    name = f"(h) 20 MB to a site's agent and back ({found.cpu:.2f} s of CPU)"
    yield Line("agent", name, found.wall, target="< 0.3 s", pairs=5)


def deployment_part(extent: Extent) -> Lines:
    """(i): rounds of two real sites as real processes; and that a site loads its base model once."""
    found = deployed_round(extent.deployed_rounds)
    size = f"{found.bytes_up / 1e6:.1f} MB, {found.cpu_s:.1f} s of CPU"
    pairs = len(found.seconds)
    yield Line("deployment", f"(i) a round of two real sites ({size})", found.median_s, target="< 6 s", pairs=pairs)
    loads = max(found.model_loads.values())
    name = f"(i) base models that a site loads in {extent.deployed_rounds} rounds"
    yield Line("deployment", name, loads, unit="", target="1")


def scale_part(extent: Extent) -> Lines:
    """(e): peak memory with many clients over that with 100."""
    few, many = compare_scale((100, extent.clients), 100, extent.scale_rounds, 8)
    ratio = many["peak_mib"] / few["peak_mib"]
    name = f"(e) peak memory, {extent.clients} clients / 100"
    yield Line("scale", name, many["peak_mib"], few["peak_mib"], ratio, unit="MiB", target="<= 1.2")


def bf16_part(extent: Extent) -> Lines:
    """(f): what bf16 gives on this CPU: matrix rate and step."""
    config = case_config(load_run_config(ROOT / "configs" / "quickstart.yaml", []), CASES[0])
    case = CASES[0]
    model = resident_model(config, "cpu")
    arithmetic, tokens = arithmetic_of(model), case.rows * case.tokens
    rates = {torch.bfloat16: [0.0] * extent.steps, torch.float32: [0.0] * extent.steps}
    for turn in range(extent.steps):
        for dtype, found in rates.items():
            found[turn] = matrix_rate(arithmetic, tokens, case.rows, model.device, dtype) / 1e9
    ours, baseline = rates.values()
    ratio = median(a / b for a, b in zip(ours, baseline, strict=True))
    name = "(f) matrix rate, bf16 / fp32, 1 thread"
    yield Line("bf16", name, median(ours), median(baseline), ratio, ratio, "GFLOP/s", pairs=extent.steps)
    works = [
        StepWork(with_overrides(config, [f"model.dtype={dtype}"]), case.rows, case.tokens) for dtype in ("bf16", "fp32")
    ]
    wall, cpu = in_pairs("(f) plain step, bf16 / fp32", works[0].plain, works[1].plain, extent.steps)
    yield of_measurements("bf16", wall, cpu)
    resident.clear()


def dp_part(extent: Extent) -> Lines:
    """Single steps with DP over without, over Opacus' ways, and their memory."""
    base = load_run_config(ROOT / "configs" / "quickstart.yaml", [])
    figures = dp_figures(base, CASES, extent.steps)
    for figure in figures:
        if figure.unit == "s":
            yield of_measurements("dp", figure, next(figures))
        else:
            line = Line("dp", figure.name, figure.ours, figure.baseline, figure.ratio)
            yield replace(line, unit=figure.unit, pairs=figure.runs)


def aggregation_part(extent: Extent) -> Lines:
    """(g): the round of 32 sites at rank 16 by every method, each in a process; and one layer of it the dense way."""
    size, layers = extent.aggregated
    for method in METHODS:
        whole = in_child(method, "factored", 32, 16, size, layers)
        name = f"(g) {method}, {layers} layers"
        yield Line("aggregation", f"{name} ({whole['cpu_s']:.1f} s of CPU)", whole["wall_s"])
        held = whole["updates_mib"] + whole["growth_mib"]
        yield Line("aggregation", f"{name}, memory with all updates", held, unit="MiB")
        if method not in DENSE:
            continue
        dense, one = (in_child(method, way, 32, 16, size, 1) for way in ("dense", "factored"))
        for key, unit in (("wall_s", "s"), ("growth_mib", "MiB")):
            ratio = one[key] / max(dense[key], 1e-9)
            line = Line("aggregation", f"(g) {method}, 1 layer / dense", one[key], dense[key], ratio, unit=unit)
            yield replace(line, cpu_ratio=one["cpu_s"] / dense["cpu_s"]) if unit == "s" else line


PARTS: dict[str, Callable[[Extent], Lines]] = {
    "real": real_part,
    "virtual": virtual_part,
    "private": private_part,
    "start": start_part,
    "idle": idle_part,
    "agent": agent_part,
    "deployment": deployment_part,
    "scale": scale_part,
    "bf16": bf16_part,
    "dp": dp_part,
    "aggregation": aggregation_part,
}
