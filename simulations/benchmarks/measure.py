"""Timing two ways of doing the same work, in pairs, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True)
class Measurement:
    """One line of ``bench.json``.

    Attributes:
        name: what was measured.
        ratio: median over the pairs of ours / baseline; below 1 is faster.
        ours: median of ours, in ``unit``.
        baseline: median of the baseline, in ``unit``.
        unit: unit of both.
        runs: number of pairs.
    """

    name: str
    ratio: float
    ours: float
    baseline: float
    unit: str
    runs: int

    def as_dict(self) -> dict[str, str | float | int]:
        """Return it as plain values for JSON."""
        return asdict(self)


def in_pairs(name: str, ours: Callable[[], None], baseline: Callable[[], None], runs: int) -> list[Measurement]:
    """Time ``ours`` and ``baseline`` alternately, in turn first, after one untimed run of each.

    Returns:
        Two measurements: of wall seconds and of CPU seconds of this process.
    """
    ours()
    baseline()
    pairs = []
    for number in range(runs):
        if number % 2 == 0:
            first, second = _timed(ours), _timed(baseline)
        else:
            second, first = _timed(baseline), _timed(ours)
        pairs.append((first, second))
    return [
        measurement(f"{name}, {clock}", [(a[index], b[index]) for a, b in pairs])
        for index, clock in enumerate(("wall", "CPU"))
    ]


def measurement(name: str, pairs: Sequence[tuple[float, float]], unit: str = "s") -> Measurement:
    """Return the medians of (ours, baseline) pairs, in ``unit``, and of their ratios."""
    ratio = median(ours / baseline for ours, baseline in pairs)
    ours, baseline = (median(pair[side] for pair in pairs) for side in (0, 1))
    return Measurement(name, ratio, ours, baseline, unit, len(pairs))


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@dataclass(frozen=True)
class Seconds:
    """What a piece of work took.

    Attributes:
        wall: seconds.
        cpu: CPU seconds of this process and of children that ended meanwhile.
    """

    wall: float
    cpu: float


def seconds_of(work: Callable[[], object]) -> Seconds:
    """Do ``work`` once and return what it took, worker processes included."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Seconds(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def in_turns(sides: Mapping[str, Callable[[], Seconds]], turns: int) -> dict[str, list[Seconds]]:
    """Run every side once a turn, in alternating order; nothing is run untimed, as whole runs start cold anyway."""
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in sides if turn % 2 == 0 else reversed(list(sides)):
            found[name].append(sides[name]())
    return found
