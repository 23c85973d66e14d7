"""Comparisons: variants as written, runs that are done once, resumed and shared, differences by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import simulations.cli
from common.config.run import RunConfig
from common.errors import ConfigError
from common.run_folder import RunFolder
from server.events import Observer
from simulations.compare.compare import compare, load_comparison, paired_differences
from simulations.compare.pictures import comparison_pictures
from simulations.engines.settings import EngineSettings
from simulations.study.curves import curve
from simulations.study.runs import Compute, PlannedRun, plan_runs, run_lock, run_missing
from simulations.study.variants import Variant, parse_variants
from tests.conftest import config_text

runner = CliRunner()
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


class Counter(Observer):
    """Counts rounds, and presses Ctrl-C after one."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rounds: list[int] = []
        self._stop_after = stop_after

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        self.rounds.append(record["round"])
        if len(self.rounds) == self._stop_after:
            raise KeyboardInterrupt


def watched_by(counter: Counter) -> Callable[[PlannedRun], AbstractContextManager[Observer]]:
    return lambda _: nullcontext(counter)


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(tmp_path, tiny_models["bert"]))
    return path


def test_variants_are_read_as_written(config: Path) -> None:
    texts = [f"{config}@aggregation.method=ffa_lora@training.lr=0.5", f"r = 4={config}@adapter.rank=4", str(config)]
    first, second, third = parse_variants(texts, ["federation.rounds=7", "training.lr=0.1"])
    assert (first.label, second.label, third.label) == ("tiny, method=ffa_lora, lr=0.5", "r = 4", "tiny")
    assert (first.config.aggregation.method, first.config.training.lr) == ("ffa_lora", 0.5)
    assert (second.config.adapter.rank, second.config.training.lr) == (4, 0.1)
    assert {variant.config.federation.rounds for variant in (first, second, third)} == {7}


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        (["", "@seed=3"], "same config"),
        (["@adapter.rank=3", "@adapter.rank=3"], "called 'tiny, rank=3'"),
        (["@adapter.rnk=3"], "did you mean 'rank'"),
        (["@rank"], "no assignment"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused(config: Path, suffixes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_variants([f"{config}{suffix}" for suffix in suffixes])


def test_labels_of_one_folder_are_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one folder"):
        plan_runs(tmp_path, [("A b", make_config()), ("a-B", make_config())], [0])
    runs = plan_runs(tmp_path, [("α", make_config()), ("β", make_config())], [0, 4])
    assert [run.folder.name for run in runs] == ["variant-1--0", "variant-2--0", "variant-1--4", "variant-2--4"]


def test_differences_are_paired_by_seed() -> None:
    (found,) = paired_differences({"a": [0.5, 0.7, 0.6], "b": [0.6, 0.8, 0.7]})
    assert found["value"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1)  # the same gain with every seed, however much the seeds differ
    assert paired_differences({"a": [0.5]}) == []


@pytest.mark.slow
def test_half_done_comparison_goes_on_where_it_was(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    variants = [Variant("fedit", make_config()), Variant("ffa", make_config(aggregation={"method": "ffa_lora"}))]
    whole = compare(variants, [0, 1], tmp_path / "whole").figures
    with pytest.raises(KeyboardInterrupt):
        compare(variants, [0, 1], tmp_path / "cut", watching=watched_by(Counter(stop_after=3)))
    assert not (tmp_path / "cut" / "compare.json").exists()
    counter = Counter()
    again = compare(variants, [0, 1], tmp_path / "cut", watching=watched_by(counter)).figures
    assert counter.rounds == [2, 1, 2, 1, 2]  # one run was whole, one had a round
    for label in ("fedit", "ffa"):
        for name in ("before", "after", "worst_site", "loss", "megabytes", "epsilon"):
            assert again["variants"][label]["per_seed"][name] == whole["variants"][label]["per_seed"][name]
    idle = Counter()
    figures = compare(variants, [0, 1], tmp_path / "cut", watching=watched_by(idle)).figures
    assert idle.rounds == []
    assert figures["differences"] == again["differences"]
    assert load_comparison(tmp_path / "cut").figures == figures


@pytest.mark.slow
def test_engine_changes_no_figure(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    variants = [Variant("fedit", make_config(federation={"rounds": 1}))]
    found = {}
    for name, workers in (("inprocess", 1), ("processes", 2)):
        compute = Compute("cpu", EngineSettings(name, workers, threads=1, cohort=1))
        found[name] = compare(variants, [0], tmp_path / name, compute=compute).figures["variants"]["fedit"]["per_seed"]
    for figure in ("after", "worst_site", "loss", "megabytes"):
        assert found["inprocess"][figure] == found["processes"][figure]


def test_folder_with_a_run_of_another_config_is_left_alone(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run_missing(plan_runs(tmp_path, [("a", make_config(federation={"rounds": 1}))], [0]))
    before = (tmp_path / "a--0" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="another config"):
        run_missing(plan_runs(tmp_path, [("a", make_config(federation={"rounds": 2}))], [0]))
    assert (tmp_path / "a--0" / "metrics.jsonl").read_bytes() == before


def test_folder_without_a_checkpoint_is_begun_anew_and_foreign_files_are_kept(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (run,) = plan_runs(tmp_path, [("a", make_config(federation={"rounds": 1}))], [0])
    (run.folder / "checkpoint").mkdir(parents=True)
    run_missing([run])
    assert run.summary() is not None
    (other,) = plan_runs(tmp_path, [("b", run.config)], [0])
    other.folder.mkdir()
    (other.folder / "thesis.txt").write_text("mine")
    with pytest.raises(Exception, match="no run folder"):
        run_missing([other])
    assert (other.folder / "thesis.txt").read_text() == "mine"


HOLD = (
    "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    "print('held', flush=True); sys.stdin.readline()"
)


def test_run_of_another_process_is_waited_for_and_taken_over(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    taken, free = plan_runs(tmp_path, [("a", make_config(federation={"rounds": 1}))], [0, 1])
    lock = taken.folder.parent / f".{taken.folder.name}.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    order: list[int] = []

    def watching(run: PlannedRun) -> AbstractContextManager[Observer]:
        order.append(run.seed)
        process.kill()  # the other process ends without having run anything
        process.wait(60)
        return nullcontext(Observer())

    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with run_lock(taken.folder) as is_free:
                assert not is_free
            run_missing([taken, free], watching=watching)
        finally:
            process.kill()
    assert order == [1, 0]
    assert taken.summary() is not None


def test_curve_adds_up_bytes_and_epsilon(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=PRIVATE, federation={"rounds": 3}, evaluation={"every": 2})
    (run,) = plan_runs(tmp_path, [("a", config)], [0])
    run_missing([run])
    points = curve(run.folder, run.config, "accuracy")
    assert [point.round for point in points] == [0, 2, 3]
    summary = run.summary()
    assert summary is not None
    sent = sum(sum(counts) for key in ("bytes_up", "bytes_down") for counts in summary[key].values())
    assert points[-1].megabytes == pytest.approx(sent / 1e6)
    assert points[0].epsilon == 0.0
    assert points[-1].epsilon == pytest.approx(max(summary["epsilon"].values()))
    assert points[-1].headline == summary["metrics_after"]["test"]["overall"]["accuracy"]
    assert points[-1].simulated_s is None
    log = RunFolder(run.folder).metrics
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["kind"] == "round":
            record["simulated_s"] = {"round": 2.5, "sites": {}}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [point.simulated_s for point in curve(run.folder, run.config, "accuracy")] == [0.0, 5.0, 7.5]


@pytest.mark.slow
def test_command_compares_and_leaves_pictures_and_a_report(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", str(config), f"{config}@aggregation.method=ffa_lora", "--seeds", "2", "--out", str(out)]
    result = runner.invoke(simulations.cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures == json.loads((out / "compare.json").read_text())
    assert {"compare.json", "curves.png", "curves.svg", "after.png", "after.svg", "report.html", "runs"} == {
        path.name for path in out.iterdir()
    }
    again = runner.invoke(simulations.cli.app, [*arguments, "--set", "federation.rounds=1"])
    assert again.exit_code == 2
    assert "another config" in again.stderr
    pictures = comparison_pictures(load_comparison(out))
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)
    assert [picture.svg for picture in pictures] == [(out / f"{picture.name}.svg").read_bytes() for picture in pictures]
