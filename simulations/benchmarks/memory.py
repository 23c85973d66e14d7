"""Peak memory of training steps, each way in a process of its own.

::

    python -m simulations.benchmarks.memory CONFIG.yaml WAY ROWS TOKENS STEPS

prints one line of JSON. ``loaded`` is the resident set once model, rows and optimizer are there and before any step;
``peak`` is the largest resident set of the process at any time, read after the steps: ``VmHWM`` on Linux, where
``ru_maxrss`` would also count the parent as it was at the fork, else ``ru_maxrss``. Both ways import the same modules,
so that the processes differ in the steps alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from common.errors import RunError
from simulations.benchmarks.measure import Measurement, measurement

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Memory of one process.

    Attributes:
        loaded_bytes: resident before the first step.
        peak_bytes: most resident at any time of the process.
    """

    loaded_bytes: int
    peak_bytes: int

    @property
    def growth_bytes(self) -> int:
        """What the steps added at most; at least a page, so that it can be divided by."""
        return max(self.peak_bytes - self.loaded_bytes, 4096)


def compare_memory(
    name: str, config: RunConfig, rows: int, tokens: int, pairs: int, steps: int = 3
) -> list[Measurement]:
    """Measure DP steps against plain ones, in fresh processes.

    Returns:
        Two measurements in MiB: the whole process' peak, and its growth above the loaded model.

    Raises:
        RunError: if a process fails.
    """
    found = [tuple(_in_child(config, way, rows, tokens, steps) for way in ("captured", "plain")) for _ in range(pairs)]
    whole = [(ours.peak_bytes / MIB, base.peak_bytes / MIB) for ours, base in found]
    growth = [(ours.growth_bytes / MIB, base.growth_bytes / MIB) for ours, base in found]
    return [
        measurement(f"{name}, peak memory of the process", whole, "MiB"),
        measurement(f"{name}, peak memory above the loaded model", growth, "MiB"),
    ]


def _in_child(config: RunConfig, way: str, rows: int, tokens: int, steps: int) -> Peak:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_run_config(config), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(path), way, *map(str, (rows, tokens, steps))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunError(f"a memory benchmark ended with status {done.returncode} ({last[:200]}); expected 0.")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _measure(config: RunConfig, way: str, rows: int, tokens: int, steps: int) -> Peak:
    import torch

    from simulations.benchmarks.step_work import StepWork

    torch.set_num_threads(1)
    work = StepWork(config, rows, tokens, steps)
    loaded = resident_bytes()
    {"captured": work.captured, "plain": work.plain}[way]()
    return Peak(loaded, peak_bytes())


def resident_bytes() -> int:
    """Return the resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    from common.quiet import quiet_dependencies

    quiet_dependencies()
    path, way, *numbers = sys.argv[1:]
    peak = _measure(load_run_config(Path(path), []), way, *map(int, numbers))
    print(json.dumps(vars(peak)))
