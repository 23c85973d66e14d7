from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.state import KEPT_ROUNDS, KEPT_RUNS, SiteStates
from common.errors import RunError
from common.tensors import Tensors

RUN = "0" * 32


def tensors(value: float) -> Tensors:
    return {"b": torch.full((2, 3), value), "a": torch.tensor([value])}


def value_of(state: Tensors | None) -> float | None:
    return None if state is None else float(state["a"])


def test_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    states = SiteStates(tmp_path / "states.db")
    kept = {"x": torch.randn(3, 2).t(), "y": torch.randn(4, dtype=torch.float64)}
    states.write(RUN, "north", 1, {"adapter": kept})
    read = SiteStates(tmp_path / "states.db").before(RUN, "north", "adapter", 2)
    assert read is not None
    assert all(torch.equal(read[name], kept[name]) for name in kept)
    assert read.keys() == kept.keys()
    assert (tmp_path / "states.db").stat().st_mode & 0o077 == 0


def test_state_is_of_its_run_site_and_name(tmp_path: Path) -> None:
    states = SiteStates(tmp_path / "states.db")
    assert states.before(RUN, "north", "variate", 1) is None
    states.write(RUN, "north", 1, {"variate": tensors(1), "adapter": tensors(2)})
    assert value_of(states.before(RUN, "north", "variate", 2)) == 1
    assert value_of(states.before(RUN, "north", "adapter", 2)) == 2
    assert states.before(RUN, "south", "variate", 2) is None
    assert states.before("1" * 32, "north", "variate", 2) is None
    assert states.sites(RUN, "variate") == ("north",)
    states.drop(RUN)
    assert states.sites(RUN, "variate") == ()


def test_resumed_round_sees_the_state_before_it_and_takes_the_later_ones_back(tmp_path: Path) -> None:
    states = SiteStates(tmp_path / "states.db")
    for number in (1, 2, 3):
        states.write(RUN, "north", number, {"variate": tensors(number)})
    assert value_of(states.before(RUN, "north", "variate", 3)) == 2
    states.write(RUN, "north", 3, {"variate": tensors(30)})
    assert value_of(states.before(RUN, "north", "variate", 4)) == 30
    states.write(RUN, "north", 2, {"variate": tensors(20)})
    assert value_of(states.before(RUN, "north", "variate", 9)) == 20


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 6)), max_size=12))
def test_store_agrees_with_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[str, int]]
) -> None:
    states = SiteStates(tmp_path_factory.mktemp("states") / "states.db", together=True)
    known: dict[str, dict[int, int]] = {"a": {}, "b": {}}
    for count, (site, number) in enumerate(written):
        states.write(RUN, site, number, {"variate": tensors(count)})
        earlier = {r: v for r, v in known[site].items() if r < number}
        known[site] = dict(sorted({**earlier, number: count}.items())[-KEPT_ROUNDS:])
    for site, by_round in known.items():
        for number in range(8):
            expected = max((r for r in by_round if r < number), default=None)
            found = value_of(states.before(RUN, site, "variate", number))
            assert found == (None if expected is None else by_round[expected])
    states.close()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=12))
def test_states_of_the_newest_runs_are_kept_and_an_older_run_is_refused(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, int]]
) -> None:
    states = SiteStates(tmp_path_factory.mktemp("states") / "states.db", kept_runs=2)
    known: dict[int, dict[int, int]] = {}
    for count, (run, number) in enumerate(written):
        states.write(f"{run}" * 32, "north", number, {"variate": tensors(count)})
        earlier = {r: v for r, v in known.pop(run, {}).items() if r < number}
        known[run] = {**earlier, number: count}  # the newest run last
        for old in list(known)[:-2]:
            known[old] = {}
    for run in range(6):
        if run in known and run not in list(known)[-2:]:
            with pytest.raises(RunError, match="was dropped after newer runs; expected one of the 2 runs"):
                states.before(f"{run}" * 32, "north", "variate", 9)
        else:
            by_round = known.get(run, {})
            expected = by_round[max(by_round)] if by_round else None
            assert value_of(states.before(f"{run}" * 32, "north", "variate", 9)) == expected


def test_file_does_not_grow_with_the_number_of_runs(tmp_path: Path) -> None:
    path, own = tmp_path / "states.db", {"a": torch.zeros(10_000)}
    SiteStates(path).write("f" * 32, "north", 1, {"variate": own})  # by a version that kept all
    states, sizes = SiteStates(path, kept_runs=KEPT_RUNS), []
    for run in range(4 * KEPT_RUNS):
        states.write(f"{run:032x}", "north", 1, {"variate": own})
        sizes.append(path.stat().st_size)
    assert sizes[-1] < sizes[KEPT_RUNS] + 40_000
    with pytest.raises(RunError, match="was dropped"):
        states.before("f" * 32, "north", "variate", 2)


def test_crash_between_write_and_commit_leaves_the_round_before(tmp_path: Path) -> None:
    path = tmp_path / "states.db"
    SiteStates(path).write(RUN, "north", 1, {"variate": tensors(1), "adapter": tensors(1)})
    script = f"""
        import os, signal, sqlite3, torch
        from pathlib import Path
        from client import state

        class Killed(sqlite3.Connection):
            inserted = 0
            def execute(self, query, *values):
                found = super().execute(query, *values)
                Killed.inserted += query.startswith("INSERT")
                if Killed.inserted == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

        connect = sqlite3.connect
        state.sqlite3.connect = lambda *a, **k: connect(*a, factory=Killed, **k)
        own = {{"a": torch.tensor([2.0])}}
        state.SiteStates(Path({str(path)!r})).write({RUN!r}, "north", 2, {{"variate": own, "adapter": own}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=os.environ, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    assert value_of(SiteStates(path).before(RUN, "north", "variate", 9)) == 1
    assert value_of(SiteStates(path).before(RUN, "north", "adapter", 9)) == 1


@pytest.mark.parametrize(
    "damage", [lambda content: b"x" * len(content), lambda content: content[:5000] + b"\xff" * (len(content) - 5000)]
)
def test_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "states.db"
    SiteStates(path).write(RUN, "north", 1, {"variate": {"a": torch.zeros(5000)}})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match="cannot be used"):
        SiteStates(path).before(RUN, "north", "variate", 2)


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be (written|used)"):
        SiteStates(tmp_path / "nowhere" / "states.db").write(RUN, "north", 1, {"variate": tensors(1)})


@pytest.mark.slow
def test_ten_thousand_sites_do_not_grow_memory(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    states, process = SiteStates(tmp_path / "states.db", together=True), psutil.Process()
    own = {"a": torch.zeros(2000)}

    def pass_over(sites: range) -> int:
        for site in sites:
            states.write(RUN, f"site {site}", 1, {"variate": own})
            assert states.before(RUN, f"site {site}", "variate", 2) is not None
        return int(process.memory_info().rss)

    few = pass_over(range(200))
    many = pass_over(range(200, 10_000))
    states.sync()
    assert (tmp_path / "states.db").stat().st_size > 75e6
    assert many - few < 8e6
    states.close()


def test_synced_state_is_in_the_file_itself(tmp_path: Path) -> None:
    path, copy = tmp_path / "states.db", tmp_path / "copy.db"
    states = SiteStates(path, together=True)
    states.write(RUN, "north", 1, {"variate": tensors(1)})
    states.sync()
    copy.write_bytes(path.read_bytes())
    assert value_of(SiteStates(copy).before(RUN, "north", "variate", 2)) == 1
    states.close()
