"""Plants nine privacy bugs, one at a time, in a copy of the repository and checks that the tests catch each.

::

    python -m tests.mutants            (or: make mutants)

A bug is one source line replaced by others. It is caught if the tests named with it, which pass on the clean copy,
fail. Exit status 0 only if all are caught; a line that is not found exactly once ends the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("common", "client", "server", "simulations", "tests", "configs", "pyproject.toml")

STEP, LOOP, CLIPPING = "client/dp/step.py", "client/training/loop.py", "client/dp/clipping.py"
SITE_ROUND = "client/training/site_round.py"
STEP_TESTS, STATISTICS = "tests/client/test_dp_step.py", "tests/client/test_dp_statistics.py"
NOISE_TEST = f"{STATISTICS}::test_noise_of_every_clipping_has_its_deviation_over_a_million_draws"
SUM_TEST = f"{STEP_TESTS}::test_step_is_the_sum_of_clipped_one_by_one_gradients"
SENSITIVITY_TEST = (
    "tests/client/test_sensitivity.py::test_one_record_more_moves_the_sum_by_at_most_the_clip[flat-bert-classification]"
)
POISSON_TEST = f"{STATISTICS}::test_every_step_of_training_is_a_poisson_sample_and_adds_noise"


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        name: what goes wrong.
        path: the file, relative to the root.
        line: the source line that is replaced, with its indentation.
        replacement: what stands there instead.
        tests: what should fail, as pytest takes it.
    """

    name: str
    path: str
    line: str
    replacement: str
    tests: tuple[str, ...]


NOISE_LINE = "        noise *= self.noise_multiplier * self._clip.value"

MUTANTS = (
    Mutant("no noise", STEP, NOISE_LINE, NOISE_LINE + " * 0.0", (NOISE_TEST,)),
    Mutant("half noise", STEP, NOISE_LINE, NOISE_LINE + " * 0.5", (NOISE_TEST,)),
    Mutant(
        "no clipping",
        CLIPPING,
        "    return torch.where(norms > bound, bound / norms.clamp(min=1e-300), 1.0)",
        "    return torch.ones_like(norms)",
        (SENSITIVITY_TEST,),
    ),
    Mutant(
        "twice the clip",
        STEP,
        "        bound = self._clip.value / (1.0 + self._margin) / len(self._groups) ** 0.5",
        "        bound = 2.0 * self._clip.value / (1.0 + self._margin) / len(self._groups) ** 0.5",
        (f"{SUM_TEST}[bert-classification-0.05-captured]",),
    ),
    Mutant(
        "shuffling for Poisson",
        SITE_ROUND,
        "        batches = poisson_batches(site.num_units(mechanism.unit), mechanism.sample_rate, steps, stream)",
        "        size = max(1, round(mechanism.expected_batch_size))\n"
        '        order = torch_generator(0, "order", round_number)\n'
        "        batches = shuffled_batches(site.num_units(mechanism.unit), size, steps, order)",
        (POISSON_TEST,),
    ),
    Mutant(
        "actual batch size",
        STEP,
        "        self._advance(last=True)",
        "        self._optimizer.expected_batch_size = max(1, rows)\n        self._advance(last=True)",
        (f"{STEP_TESTS}::test_sum_is_divided_by_the_expected_not_the_actual_batch",),
    ),
    Mutant(
        "shared noise stream",
        "common/randomness.py",
        "        return CryptoStream(secrets.token_bytes(32))",
        "        return CryptoStream(_digest(0, purpose, round_number))",
        (f"{STATISTICS}::test_no_two_sites_rounds_or_steps_share_noise",),
    ),
    Mutant(
        "empty batch skipped",
        LOOP,
        "    step.apply(len(batch))",
        "    if batch:\n        step.apply(len(batch))",
        (POISSON_TEST,),
    ),
    Mutant(
        "loss a mean of the batch",
        "common/tasks/causal_lm.py",
        "    return losses.sum(dim=1) / learnt.sum(dim=1).clamp(min=1)",
        "    return losses.sum(dim=1) / learnt.sum().clamp(min=1)",
        (f"{SUM_TEST}[llama-causal_lm-0.05-captured]", f"{SUM_TEST}[llama-causal_lm-1000000.0-captured]"),
    ),
)


def mutated(mutant: Mutant, source: str) -> str:
    """Return the source with the bug planted.

    Raises:
        LookupError: if its line is not there exactly once.
    """
    lines = source.split("\n")
    if lines.count(mutant.line) != 1:
        raise LookupError(
            f"{mutant.path} has the line {mutant.line.strip()!r} {lines.count(mutant.line)} times; expected once. "
            f"Anchor the mutant {mutant.name!r} on the line that is there now."
        )
    lines[lines.index(mutant.line)] = mutant.replacement
    return "\n".join(lines)


def run_tests(folder: Path, tests: tuple[str, ...]) -> bool:
    """Run tests in a copy of the repository and return whether they pass.

    Raises:
        RuntimeError: if they could not be run; a bug that breaks the import is not caught by a test.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or (done.returncode == 1 and "FAILED" not in done.stdout):
        raise RuntimeError(f"pytest ended with status {done.returncode}; expected 0 or 1.\n{done.stdout[-2000:]}")
    return done.returncode == 0


def copy_repository(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)


def survivors(console: Console) -> list[str]:
    """Plant every bug, print the table and return the names of those that no test caught.

    Raises:
        LookupError: for a bug that cannot be planted.
        RuntimeError: if a test fails without any bug, or cannot be run.
    """
    table, survived = Table("planted bug", "verdict", "seconds", "tests"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        if not run_tests(folder, tuple(dict.fromkeys(test for mutant in MUTANTS for test in mutant.tests))):
            raise RuntimeError("a test fails without any planted bug; expected all to pass. Run make test-quick.")
        for mutant in MUTANTS:
            path, began = folder / mutant.path, time.perf_counter()
            clean = path.read_text(encoding="utf-8")
            path.write_text(mutated(mutant, clean), encoding="utf-8")
            caught = not run_tests(folder, mutant.tests)
            path.write_text(clean, encoding="utf-8")
            if not caught:
                survived.append(mutant.name)
            shown = ", ".join(test.partition("::")[2].partition("[")[0] for test in mutant.tests[:1])
            verdict = "caught" if caught else "SURVIVED"
            table.add_row(mutant.name, verdict, f"{time.perf_counter() - began:.0f}", shown)
    console.print(table)
    console.print(f"{len(MUTANTS) - len(survived)} of {len(MUTANTS)} caught")
    return survived


if __name__ == "__main__":
    sys.exit(1 if survivors(Console(width=160)) else 0)
