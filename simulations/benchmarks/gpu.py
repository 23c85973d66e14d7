"""The benchmark table on a GPU, with a Llama of 1B's shape and random weights.

::

    python -m simulations.benchmarks.gpu                        # needs CUDA; without it says so
    python -m simulations.benchmarks.gpu --device cpu --tiny    # the same code with a tiny model, to try it

Seconds are of the rounds alone, wall: what comes before the first one, loading and tokenising, is not in them. "Ours /
limit" is the inverse of the share of the device's measured matrix rate, bf16 for the bf16 base: see
:mod:`simulations.benchmarks.limit` for what is counted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from common.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402

from common.config.load import parse_run_config  # noqa: E402
from common.config.run import RunConfig  # noqa: E402
from common.errors import FedtuneError  # noqa: E402
from common.models import resident  # noqa: E402
from server.events import Observer  # noqa: E402
from simulations.benchmarks.harness import run_fedtune, run_plain_loop  # noqa: E402
from simulations.benchmarks.limit import now  # noqa: E402
from simulations.benchmarks.lines import Line, as_json, compared, markdown_table, terminal_table, wide_console  # noqa: E402
from simulations.benchmarks.measure import Seconds, in_turns  # noqa: E402
from simulations.benchmarks.page import write_between  # noqa: E402
from simulations.benchmarks.random_llama import BILLION, TINY, Shape, save_llama, write_rows  # noqa: E402
from simulations.benchmarks.sides import Limit  # noqa: E402
from simulations.benchmarks.step_work import with_overrides  # noqa: E402
from simulations.benchmarks.works import ROOT, private_sites  # noqa: E402
from simulations.engines.settings import EngineSettings  # noqa: E402

PART = "gpu"


class _Rounds(Observer):
    """Notes when the rounds begin."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.began = device, Seconds(0.0, 0.0)

    def start(self) -> None:
        """Begin now."""
        now(self._device)  # waits until the device has computed what it was given
        self.began = Seconds(time.perf_counter(), time.process_time())

    def taken(self) -> Seconds:
        """Return what passed since."""
        now(self._device)
        return Seconds(time.perf_counter() - self.began.wall, time.process_time() - self.began.cpu)

    def round_started(self, number: int, cohort: Sequence[str]) -> None:
        if number == 1:
            self.start()


def gpu_lines(shape: Shape, folder: Path, device: torch.device, pairs: int) -> Iterator[Line]:
    """Yield the table's lines.

    Args:
        shape: of model and data.
        folder: for them.
        device: to compute on.
        pairs: turns of runs, after one that is not timed.
    """
    save_llama(shape, folder / "base", str(device))
    sites = _config(shape, folder, shape.sites, shape.rows, 8)
    small = _config(shape, folder, shape.virtual, 2, 2)
    limit = Limit(sites, str(device))
    rates = [limit.rate() for _ in range(3)]
    yield Line(PART, "matrix rate of the model's shapes", median(rates) / 1e12, unit="TFLOP/s", pairs=3)
    resident.clear()
    sides = {
        "ours": _ours(sites, device),
        "bare": _bare(sites, device),
        "private": _ours(private_sites(sites), device),
        "fp32": _ours(with_overrides(sites, ["model.dtype=fp32"]), device),
    }
    found = _timed(sides, pairs)
    ours, limits = found["ours"], [limit.operations / rate for rate in [median(rates)] * pairs]
    line = compared(PART, "(a) ours / bare loop", ours, found["bare"])
    yield _by_wall(line, limits)
    yield _tokens("(a) tokens per second, ours", limit.tokens, ours, found["bare"])
    share = median(need / one.wall for need, one in zip(limits, ours, strict=True))
    yield Line(PART, "(a) ours: share of the measured matrix rate", 100 * share, unit="%", pairs=pairs)
    yield _wall(compared(PART, "(c) ours with DP / without", found["private"], ours, "<= 1.1"))
    yield _wall(compared(PART, "(f) ours on a bf16 base / fp32", ours, found["fp32"]))
    cohorts = _timed(
        {"auto": _ours(small, device), "one": _ours(small, device, cohort=1), "bare": _bare(small, device)}, pairs
    )
    yield _wall(compared(PART, "(b) ours / bare loop", cohorts["auto"], cohorts["bare"], "<= 0.6"))
    yield _wall(compared(PART, "(b) cohort batching / one by one", cohorts["auto"], cohorts["one"]))
    small_tokens = Limit(small, str(device)).tokens
    yield _tokens("(b) tokens per second, ours", small_tokens, cohorts["auto"], cohorts["bare"])
    resident.clear()


def _timed(sides: dict[str, Callable[[], Seconds]], pairs: int) -> dict[str, list[Seconds]]:
    """Seconds by side; the first turn warms the device up and is left out."""
    return {name: found[1:] for name, found in in_turns(sides, pairs + 1).items()}


def _tokens(name: str, tokens: int, ours: Sequence[Seconds], baseline: Sequence[Seconds]) -> Line:
    rates = [[tokens / one.wall for one in side] for side in (ours, baseline)]
    ratio = median(a / b for a, b in zip(*rates, strict=True))
    return Line(PART, name, median(rates[0]), median(rates[1]), ratio, unit="tokens/s", pairs=len(ours))


def _wall(line: Line) -> Line:
    """Leave out CPU seconds, which say nothing of a device."""
    return replace(line, cpu_ratio=None)


def _by_wall(line: Line, limits: Sequence[float]) -> Line:
    limit = median(limits)
    baseline = None if line.baseline is None else limit / line.baseline
    return replace(_wall(line), limit_over_baseline=baseline, ours_over_limit=line.ours / limit)


def _ours(config: RunConfig, device: torch.device, cohort: int | None = None) -> Callable[[], Seconds]:
    def run() -> Seconds:
        clock = _Rounds(device)
        run_fedtune(config, EngineSettings(cohort=cohort), str(device), clock)
        return clock.taken()

    return run


def _bare(config: RunConfig, device: torch.device) -> Callable[[], Seconds]:
    def run() -> Seconds:
        resident.clear()  # one model on the device at a time
        clock = _Rounds(device)
        run_plain_loop(config, str(device), clock.start)
        return clock.taken()

    return run


def _config(shape: Shape, folder: Path, sites: int, rows: int, batch_size: int) -> RunConfig:
    data = write_rows(shape, folder / f"rows-{sites}.jsonl", sites, rows)
    settings = {
        "name": "gpu",
        "model": {"source": str(folder / "base"), "dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"task": "causal_lm", "train": str(data), "max_length": shape.tokens},
        "training": {"lr": 1e-3, "batch_size": batch_size, "local_epochs": 1},
        "privacy": {"unit": "none"},
        "federation": {"rounds": 1},
        "aggregation": {"method": "fedit", "weights": "examples"},
        "evaluation": {"enabled": False},
    }
    return parse_run_config(json.dumps(settings), "gpu", None)


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to try the script.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model and few rows.")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Turns of runs.")] = 3,
    out: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("bench-gpu.json"),
    write_docs: Annotated[bool, typer.Option("--write-docs", help="Write the table into docs/benchmarks.md.")] = False,
) -> None:
    """Measure, and print one table."""
    if device.partition(":")[0] not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device!r}; expected cuda, cuda:N or cpu.", param_hint="--device")
    console = wide_console()
    if device != "cpu" and not torch.cuda.is_available():
        console.print("no CUDA device is available; nothing was measured. Use --device cpu --tiny to try the script.")
        return
    torch.set_num_threads(1)
    chosen = torch.device(device)
    shape = TINY if tiny else BILLION
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU, 1 thread"
    title = f"{name}; Llama {shape.layers} x {shape.width}, bf16; {pairs} turns"
    try:
        with tempfile.TemporaryDirectory() as folder:
            lines = list(gpu_lines(shape, Path(folder), chosen, pairs))
        console.print(terminal_table(lines, title))
        out.write_text(as_json(lines), encoding="utf-8")
        if write_docs:
            write_between(ROOT / "docs" / "benchmarks.md", "bench-gpu", f"{title}.\n\n{markdown_table(lines)}")
    except FedtuneError as error:
        console.print(f"error: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
