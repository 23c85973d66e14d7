"""Writes the tables of ``docs/codecs.md``: what each codec does to accuracy and bytes, and to a larger update's bytes.

Run it with

    python -m simulations.results.codecs --seeds 8

Every variant is run with every seed on the same rows, into ``runs/codecs/``; runs that are complete are not repeated.
The set-up is small so that two cores finish in minutes: eight sites of 64 messages, LoRA on the uppermost layer, no DP.
The seeds and the test rows are as many as it takes to tell a change of 0.3 points from none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
import yaml

from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.communication import CommunicationConfig
from common.console import one_line_errors
from common.errors import ConfigError
from common.factor_names import A, B
from simulations.commands.options import set_up
from simulations.results.page import markdown, write_tables
from simulations.study.intervals import over_seeds
from simulations.study.runs import PlannedRun, plan_runs, run_missing, timed
from simulations.study.shown import mean_and_half, signed_interval
from simulations.study.variants import Variant, parse_variants

ROOT = Path(__file__).resolve().parents[2]
RUNS, PAGE = ROOT / "runs" / "codecs", ROOT / "docs" / "codecs.md"

SET_UP = (
    "privacy={unit: none}",
    "aggregation.method=fedit",
    "adapter.target_modules=[layer.5.attention.self.query, layer.5.attention.self.value]",
    "training={optimizer: adamw, lr: 4.0e-3, head_lr: 0.03, batch_size: 8}",
    "data.max_rows_per_site=64",
    "evaluation={every: 0, products: false}",
)
PACKINGS: dict[str, str] = {
    "fp32": "{codec: fp32}",
    "bf16": "{codec: bf16}",
    "int8": "{codec: int8}",
    "int8, block 256, zstd 3": "{codec: int8, block: 256, zstd: 3}",
    "int4 up, int8 down": "{codec: int4}",
    "int4 up and down": "{codec: int4, down: int4}",
    "int4 up and down, block 128, zstd 3": "{codec: int4, down: int4, block: 128, zstd: 3}",
    "top-k 0.1 of int8 up, int8 down": "{codec: int8, top_k: 0.1}",
}
"""``communication`` of each variant, by its label; the first is what others are compared with."""

LARGE_PACKINGS: dict[str, str] = {
    "fp32": "{codec: fp32}",
    "bf16": "{codec: bf16}",
    "int8": "{codec: int8}",
    "int8, block 256, zstd 3": "{codec: int8, block: 256, zstd: 3}",
    "int4": "{codec: int4}",
    "int4, block 128, zstd 3": "{codec: int4, block: 128, zstd: 3}",
    "top-k 0.1 of int8": "{codec: int8, top_k: 0.1}",
}
"""``communication`` of the updates whose bytes alone are shown."""

COMMAND = "python -m simulations.results.codecs"

LARGE_RANK, LARGE_SIDE = 16, 4096
"""Of the factors whose bytes are shown besides: query and value of a layer of 4096 x 4096."""


def variants() -> list[Variant]:
    """Return the quickstart without DP, packed in every way."""
    config = ROOT / "configs" / "quickstart.yaml"
    return parse_variants([f"{label}={config}@communication={text}" for label, text in PACKINGS.items()], SET_UP)


def table(planned: Sequence[PlannedRun]) -> str:
    """Return the Markdown table of the runs; differences and shares are to the first label, paired by seed.

    Raises:
        ConfigError: for a run that is not complete.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in planned:
        summary = run.summary()
        if summary is None:
            raise ConfigError(f"{run.folder} has no summary; expected a complete run. Run the script without --no-run.")
        found.setdefault(run.label, []).append(summary)
    rows = [["codec", "accuracy (%)", "minus fp32 (points)", "kB up", "of fp32", "kB down", "of fp32", "seeds"]]
    first = next(iter(found.values()))
    for label, summaries in found.items():
        after = [accuracy - other for accuracy, other in zip(_after(summaries), _after(first), strict=True)]
        cells = [label, mean_and_half(over_seeds(_after(summaries))), signed_interval(over_seeds(after))]
        for way in ("bytes_up", "bytes_down"):
            sent, exact = _bytes(summaries, way), _bytes(first, way)
            cells += [f"{sent / 1000:.1f}", f"{100 * sent / exact:.1f} %"]
        rows.append([*cells, str(len(summaries))])
    rows[1][2] = "-"
    return markdown(rows)


def sizes() -> dict[str, int]:
    """Return the bytes of an update of the larger factors, by packing. Its entries are normal, as under DP's noise."""
    layer = "base_model.model.model.layers.0.self_attn"
    shapes = {A: (LARGE_RANK, LARGE_SIDE), B: (LARGE_SIDE, LARGE_RANK)}
    draw = torch.Generator().manual_seed(0)
    update = {
        f"{layer}.{module}{factor}": torch.randn(shape, generator=draw)
        for module in ("q_proj", "v_proj") for factor, shape in shapes.items()
    }  # fmt: skip
    found: dict[str, int] = {}
    for label, text in LARGE_PACKINGS.items():
        packing = Packing.of_update(CommunicationConfig.model_validate(yaml.safe_load(text)))
        found[label] = len(encode(update, packing, torch.Generator().manual_seed(1)))
    return found


def sizes_table() -> str:
    """Return the Markdown table of :func:`sizes`."""
    found = sizes()
    rows = [[label, f"{count / 1000:.1f}", f"{100 * count / found['fp32']:.1f} %"] for label, count in found.items()]
    return markdown([["codec", "kB", "of fp32"], *rows])


def _after(summaries: Sequence[dict[str, Any]]) -> list[float]:
    return [100.0 * summary["metrics_after"]["test"]["overall"]["accuracy"] for summary in summaries]


def _bytes(summaries: Sequence[dict[str, Any]], way: str) -> float:
    """Bytes of a site and round, header included, as they were sent."""
    return float(mean(count for summary in summaries for counts in summary[way].values() for count in counts))


def main(
    seeds: Annotated[int, typer.Option(min=1, max=9, help="Seeds a variant, from 0.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    run: Annotated[bool, typer.Option(help="Run what is missing before writing the tables.")] = True,
) -> None:
    """Run what is missing and write the tables."""
    set_up(debug=False, threads=threads)
    with one_line_errors(debug=False):
        planned = plan_runs(RUNS, [(each.label, each.config) for each in variants()], range(seeds))
        if run:
            run_missing(planned, watching=timed, keep=True)
        write_tables(PAGE, {"codecs": table(planned), "sizes": sizes_table()}, COMMAND)


if __name__ == "__main__":
    typer.run(main)
