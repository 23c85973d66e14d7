"""What differential privacy costs a training step: the DP step over the plain one, and over Opacus' own ways.

Times are taken in alternating pairs in one process, as wall and as CPU seconds: the latter hardly see other processes.
Targets: a DP step takes at most 1.10 times the plain step, and its process at most 1.15 times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from client.start_check import self_test
from common.config.run import RunConfig
from common.models import resident
from common.models.resident import resident_model
from simulations.benchmarks.measure import Measurement, in_pairs
from simulations.benchmarks.memory import compare_memory
from simulations.benchmarks.step_work import StepWork, with_overrides

PRIVATE = (
    "privacy={unit: example, noise_multiplier: 1.0, clip_norm: 0.1, delta: 1.0e-5}",
    "training={optimizer: adamw, lr: 1.0e-4, batch_size: 16}", "aggregation={method: fedit}",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An adapter and the shape of a step.

    Attributes:
        label: what the adapter is, for the name of the figure.
        adapter: the config's adapter section, as YAML.
        rows: B, rows of a step.
        tokens: T, tokens of each row.
    """

    label: str
    adapter: str
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """Name of the case in ``bench.json``."""
        return f"{self.label}, {self.rows}x{self.tokens}"


QUERY_VALUE, ALL_LINEAR = "{rank: 8, alpha: 16}", "{rank: 16, alpha: 32, target_modules: all-linear}"
CASES = (
    Case("LoRA r=8 query, value", QUERY_VALUE, 16, 64),
    Case("LoRA r=8 query, value", QUERY_VALUE, 32, 128),
    Case("LoRA r=16 all-linear", ALL_LINEAR, 16, 64),
)


def case_config(base: RunConfig, case: Case, *more: str) -> RunConfig:
    """Return the run config of a case: the base model and labels of ``base``, and nothing to calibrate."""
    return with_overrides(base, [*PRIVATE, f"adapter={case.adapter}", *more])


def dp_figures(base: RunConfig, cases: tuple[Case, ...], pairs: int) -> Iterator[Measurement]:
    """Measure every case, one figure after the other.

    Args:
        base: run config whose base model and labels are taken.
        cases: adapters and shapes.
        pairs: timed pairs of each comparison.
    """
    for case in cases:
        config = case_config(base, case)
        work = StepWork(config, case.rows, case.tokens)
        yield from in_pairs(f"{case.name}: DP step / plain step", work.captured, work.plain, pairs)
        yield from in_pairs(f"{case.name}: Opacus hooks / plain step", work.hooks, work.plain, pairs)
        yield from in_pairs(f"{case.name}: Opacus ghost clipping / plain step", work.ghost, work.plain, pairs)
        yield from in_pairs(f"{case.name}: its ChaCha20 noise / DP step", work.noise, work.captured, pairs)
        yield from compare_memory(f"{case.name}: DP / plain", config, case.rows, case.tokens, min(pairs, 3))
    yield from _clipping_figures(base, cases[0], pairs)
    yield from _self_test_figures(base, cases[0], min(pairs, 3))
    resident.clear()


def _clipping_figures(base: RunConfig, case: Case, pairs: int) -> Iterator[Measurement]:
    flat = StepWork(case_config(base, case), case.rows, case.tokens)
    for clipping in ("per_layer", "adaptive"):
        other = StepWork(case_config(base, case, f"privacy.clipping={clipping}"), case.rows, case.tokens)
        yield from in_pairs(f"{case.name}: {clipping} / flat clipping", other.captured, flat.captured, pairs)


def _self_test_figures(base: RunConfig, case: Case, pairs: int) -> list[Measurement]:
    config = case_config(base, case)
    work = StepWork(config, case.rows, case.tokens)

    def fresh() -> None:
        self_test.cache_clear()
        self_test(resident_model(config), config)

    return in_pairs(f"{case.name}: self-test / DP step", fresh, work.captured, pairs)
