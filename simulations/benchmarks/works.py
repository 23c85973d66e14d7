"""The works of the benchmark table, as run configs, and how much of them is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config.run import RunConfig
from simulations.benchmarks.cohort import small_sites
from simulations.benchmarks.harness import benchmark_config
from simulations.benchmarks.step_work import with_overrides

ROOT = Path(__file__).resolve().parents[2]
EVERY_ROW = 100_000


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rows: most rows of a real site.
        rounds: of (a) and (c).
        sites: virtual sites of (b).
        virtual_rounds: of (b).
        pairs: turns of whole runs; Flower's simulation, which takes longest, runs once, after the last.
        steps: pairs of single steps.
        workers: processes where there are several.
        idle_sites: of (d).
        deployed_rounds: of (i).
        clients: of (e).
        scale_rounds: of (e).
        aggregated: of (g), size of the square layers and their number.
    """

    rows: int = 96
    rounds: int = 5
    sites: int = 200
    virtual_rounds: int = 3
    pairs: int = 3
    steps: int = 5
    workers: int = 2
    idle_sites: int = 1000
    deployed_rounds: int = 8
    clients: int = 10_000
    scale_rounds: int = 20
    aggregated: tuple[int, int] = (4096, 64)

    def text(self) -> str:
        """Say how much work is measured in a line, for the table's title; how often stands at each line."""
        rows = "all rows" if self.rows >= EVERY_ROW else f"at most {self.rows} rows a site"
        return (
            f"(a) and (c): {rows}, {self.rounds} rounds; (b): {self.sites} sites, {self.virtual_rounds} rounds; "
            f"(e): {self.clients} clients, {self.scale_rounds} rounds; "
            f"(g): {self.aggregated[1]} layers of {self.aggregated[0]} x {self.aggregated[0]}"
        )


QUICK = Extent(
    rows=16,
    rounds=1,
    sites=24,
    virtual_rounds=1,
    pairs=1,
    steps=3,
    idle_sites=200,
    deployed_rounds=3,
    clients=1000,
    scale_rounds=2,
    aggregated=(512, 2),
)


def real_sites(extent: Extent) -> RunConfig:
    """Work (a): the products' reviews as sites, without DP."""
    return benchmark_config(ROOT, extent.rows, extent.rounds)[1]


def private_sites(config: RunConfig) -> RunConfig:
    """Work (c): ``config`` with example-level DP; nothing has to be calibrated."""
    privacy = "privacy={unit: example, noise_multiplier: 1.0, delta: 1.0e-3, clip_norm: 0.1}"
    return with_overrides(config, [privacy, "aggregation={method: fedit, weights: uniform}"])


def virtual_sites(extent: Extent) -> RunConfig:
    """Work (b): small virtual sites of 8 rows, one step each."""
    return small_sites(ROOT, extent.sites, 8, extent.virtual_rounds, private=False)
