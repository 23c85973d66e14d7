from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.mutants import MUTANTS, ROOT, Mutant, mutated, run_tests, survivors


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_can_be_planted(mutant: Mutant) -> None:
    source = (ROOT / mutant.path).read_text(encoding="utf-8")
    planted = mutated(mutant, source)
    assert planted != source
    compile(planted, mutant.path, "exec")
    assert all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests)


@pytest.mark.parametrize("source", ["", "    a = 1\n    a = 1\n"])
def test_line_that_is_not_there_once_ends_the_run(source: str) -> None:
    mutant = Mutant("x", "x.py", "    a = 1", "    a = 2", ())
    assert mutated(mutant, "b = 0\n    a = 1\n") == "b = 0\n    a = 2\n"
    with pytest.raises(LookupError, match="expected once"):
        mutated(mutant, source)


@pytest.mark.slow
def test_tests_that_cannot_be_run_are_no_catch(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(RuntimeError, match="status"):
        run_tests(tmp_path, ("test_broken.py",))


@pytest.mark.slow
def test_every_mutant_is_caught() -> None:
    assert len(MUTANTS) == 9
    assert survivors(Console(quiet=True)) == []
