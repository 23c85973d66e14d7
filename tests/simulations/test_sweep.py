"""Sweeps: ranges as written, trials that are pruned, cut short and gone on with, and what a search costs."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

import simulations.cli
from common.config.load import load_run_config
from common.errors import ConfigError, RunError
from common.privacy.accounting import Segment, epsilon_spent
from server.events import Observer
from simulations.study.curves import Point
from simulations.study.runs import PlannedRun
from simulations.sweep.plan import ObjectiveConfig, SweepPlan, load_plan
from simulations.sweep.search import run_search
from simulations.sweep.space import grid_points, parse_dimension, parse_space
from tests.conftest import config_text

runner = CliRunner()


class Rounds(Observer):
    """Counts rounds, and presses Ctrl-C after one."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.count = 0
        self._stop_after = stop_after

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        self.count += 1
        if self.count == self._stop_after:
            raise KeyboardInterrupt

    def watch(self, _: PlannedRun) -> AbstractContextManager[Observer]:
        return nullcontext(self)


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(tmp_path, tiny_models["bert"]))
    return path


def plan_of(config: Path, *settings: str, **given: Any) -> SweepPlan:
    return load_plan(config, settings, given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log:1e-4..1e-1", optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)),
        ("0.1..0.9/0.2", optuna.distributions.FloatDistribution(0.1, 0.9, step=0.2)),
        (".5..2", optuna.distributions.FloatDistribution(0.5, 2.0)),
        ("-1..1.5", optuna.distributions.FloatDistribution(-1.0, 1.5)),
        ("4..64", optuna.distributions.IntDistribution(4, 64)),
        ("log:4..64", optuna.distributions.IntDistribution(4, 64, log=True)),
        ("2..10/4", optuna.distributions.IntDistribution(2, 10, step=4)),
        ("choice:fedit, ffa_lora", optuna.distributions.CategoricalDistribution(("fedit", "ffa_lora"))),
        ("choice:[a, b]|[c]", optuna.distributions.CategoricalDistribution(("[a, b]", "[c]"))),
    ],
)
def test_dimension_is_read_as_written(text: str, expected: object) -> None:
    dimension = parse_dimension("section.key", text)
    assert dimension is not None
    assert dimension.distribution == expected


@pytest.mark.parametrize("text", ["0.1", "fedit", "../data/train.jsonl", "a..b", "{unit: none}"])
def test_plain_value_is_no_dimension(text: str) -> None:
    assert parse_dimension("section.key", text) is None


@pytest.mark.parametrize(
    "text", ["1..1", "2..1", "log:0..1", "log:fast", "log:1..9/2", "1..2/5", "choice:a", "choice:a,a"]
)
def test_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be searched"):
        parse_dimension("section.key", text)


def test_grid_takes_every_combination() -> None:
    points = grid_points(parse_space({"a": "1..3", "b": "choice:x,y", "c": "0.1..0.3/0.1"}))
    assert len(points) == 3 * 2 * 3
    assert sorted({float(point["c"]) for point in points}) == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="no end of values"):
        grid_points(parse_space({"a": "log:1..10"}))


def test_objective_weighs_what_it_says() -> None:
    point = Point(4, 0.8, 0.5, 0.3, 20.0, 6.0, None)
    weights = ObjectiveConfig(metric=1.0, worst_site=0.5, megabyte=0.001, epsilon=0.01)
    assert weights.score(point, "accuracy") == pytest.approx(0.8 + 0.25 - 0.02 - 0.06)
    assert ObjectiveConfig().score(Point(1, 20.0, 25.0, 3.0, 0.0, None, None), "perplexity") == pytest.approx(
        -2.9957323
    )
    with pytest.raises(ConfigError, match="weighs ε"):
        weights.score(Point(4, 0.8, 0.5, 0.3, 20.0, None, None), "accuracy")
    with pytest.raises(ValueError, match="weighs neither"):
        ObjectiveConfig(metric=0.0)


def test_plan_comes_from_the_command_or_from_a_file(config: Path, tmp_path: Path) -> None:
    said = plan_of(config, "training.lr=log:1e-3..1e-1", "adapter.rank=3", trials=7)
    assert (said.search, said.set, said.trials) == ({"training.lr": "log:1e-3..1e-1"}, ("adapter.rank=3",), 7)
    path = tmp_path / "sweep.yaml"
    path.write_text("config: tiny.yaml\nsearch:\n  training.lr: log:1e-3..1e-1\nset: [adapter.rank=3]\ntrials: 7\n")
    assert load_plan(path, (), {}) == said
    trial = said.trial_config({"training.lr": 0.01})
    assert (trial.data.test, trial.data.test_fraction, trial.training.lr, trial.adapter.rank) == (None, 0.2, 0.01, 3)
    assert plan_of(config, "training.lr=1..2", validation=0.0).trial_config({"training.lr": 1}).data.test is not None
    path.write_text("config: tiny.yaml\nsearch: {training.lr: 1..2}\ntrails: 3\n")
    with pytest.raises(ConfigError, match="did you mean 'trials'"):
        load_plan(path, (), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "nothing is searched"),
        (("training.learning_rate=1..2",), "did you mean 'lr'"),
        (("seed=0..5",), "not what they are judged on"),
        (("training.lr=-2..2",), "greater than 0"),
    ],
)
def test_search_of_nothing_useful_is_refused(config: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(config, *settings)


def test_epsilon_is_not_weighed_where_there_is_none(config: Path) -> None:
    with pytest.raises(ConfigError, match="weighs ε"):
        plan_of(config, "training.lr=1..2", objective={"epsilon": 0.1})


@pytest.mark.slow
def test_search_cut_short_goes_on_and_a_finished_one_is_left(config: Path, tmp_path: Path) -> None:
    plan = plan_of(config, "training.lr=log:1e-3..1e-1", trials=3, prune=False)
    cut = Rounds(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run_search(plan, tmp_path / "s", watching=cut.watch)
    more = Rounds()
    result = run_search(plan, tmp_path / "s", watching=more.watch)
    assert more.count == 3  # two rounds a trial: the second trial had one, the third none
    assert [trial["state"] for trial in result["trials"]] == ["complete"] * 3
    assert len({trial["params"]["training.lr"] for trial in result["trials"]}) == 3
    idle = Rounds()
    assert run_search(plan, tmp_path / "s", watching=idle.watch) == result
    assert idle.count == 0
    best = load_run_config(tmp_path / "s" / "best.yaml")
    assert best.training.lr == result["best"]["params"]["training.lr"]
    assert best.data == plan.base().data  # with its test part, which no trial has seen
    with pytest.raises(ConfigError, match="another sweep"):
        run_search(plan.model_copy(update={"sampler": "random"}), tmp_path / "s")
    grown = run_search(plan.model_copy(update={"trials": 4}), tmp_path / "s")
    assert [trial["params"] for trial in grown["trials"][:3]] == [trial["params"] for trial in result["trials"]]
    assert len(grown["trials"]) == 4


@pytest.mark.slow
def test_poor_trials_are_pruned_by_round_and_all_of_it_is_charged(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("unit: none", "unit: example\n  noise_multiplier: 1.0\n  accountant: rdp")
    config.write_text(text.replace("rounds: 2", "rounds: 3"))
    # The objective only counts bytes beside a metric that hardly moves: trials of a larger rank are always behind.
    settings = ("adapter.rank=choice:1,2,3,4,16,32", "training.lr=1e-6")
    plan = plan_of(config, *settings, trials=6, sampler="grid", objective={"metric": 1e-9, "megabyte": 1.0})
    result = run_search(plan, tmp_path / "s")
    states = {trial["params"]["adapter.rank"]: trial["state"] for trial in result["trials"]}
    rounds = {trial["params"]["adapter.rank"]: trial["rounds"] for trial in result["trials"]}
    assert states == {**dict.fromkeys(("1", "2", "3", "4"), "complete"), "16": "pruned", "32": "pruned"}
    assert rounds["16"] == [1]
    assert result["best"]["params"]["adapter.rank"] == "1"
    steps = [
        outcome["mechanism"]
        for log in (tmp_path / "s" / "trials").glob("*/metrics.jsonl")
        for record in map(json.loads, log.read_text().splitlines())
        if record["kind"] == "round"
        for site, outcome in record["sites"].items()
        if site == "site 0"
    ]
    assert len(steps) == 4 * 3 + 2 * 1
    spent = result["privacy"]["site_records"]
    assert spent["epsilon_of_search"] == pytest.approx(epsilon_spent([Segment(**step) for step in steps], 1e-5, "rdp"))
    assert spent["epsilon_of_search"] > spent["epsilon_of_best"]
    assert any("Papernot and Steinke" in sentence for sentence in result["privacy_said"])


@pytest.mark.slow
def test_diverging_trial_is_recorded_and_the_search_goes_on(config: Path, tmp_path: Path) -> None:
    settings = ("training.lr=choice:0.01,1e30", "training.optimizer=sgd")
    result = run_search(plan_of(config, *settings, sampler="grid"), tmp_path / "s")
    assert sorted(trial["state"] for trial in result["trials"]) == ["complete", "failed"]
    assert result["best"]["params"]["training.lr"] == "0.01"
    assert result["privacy"] is None
    assert "may tell anything" in result["privacy_said"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "failing", "message"),
    [
        (
            ("aggregation.method=choice:fedit,fedsvd", "aggregation.server_optimizer=choice:none,fedadam"),
            {"aggregation.method": "fedsvd", "aggregation.server_optimizer": "fedadam"},
            "in the same coordinates every round",
        ),
        (("federation.min_sites=choice:9,1",), {"federation.min_sites": "9"}, "the data has 3 sites"),
        (
            ("privacy={unit: example, noise_multiplier: 1.0, accountant: rdp}", "privacy.delta=choice:0.4,1e-5"),
            {"privacy.delta": "0.4"},
            "is not below one over",
        ),
    ],
    ids=["config", "data", "privacy"],
)
def test_settings_that_do_not_go_together_fail_their_trial_alone(
    config: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: tuple[str, ...],
    failing: dict[str, str],
    message: str,
) -> None:
    plan = plan_of(config, *settings, "federation.rounds=1", "evaluation.products=false", sampler="grid")
    result = run_search(plan, tmp_path / "s")
    states = [(trial["state"], trial["params"]) for trial in result["trials"]]
    assert [params for state, params in states if state == "failed"] == [failing]
    assert len(states) == len(grid_points(plan.dimensions()))
    assert {state for state, params in states if params != failing} == {"complete"}
    assert message in caplog.text
    idle = Rounds()
    assert run_search(plan, tmp_path / "s", watching=idle.watch) == result
    assert idle.count == 0


def test_search_in_which_all_trials_fail_says_why(config: Path, tmp_path: Path) -> None:
    plan = plan_of(config, "federation.min_sites=choice:8,9", sampler="grid")
    for _ in range(2):
        with pytest.raises(RunError, match=r"all 2 trials failed.*the data has 3 sites"):
            run_search(plan, tmp_path / "s")
    assert [trial["state"] for trial in json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"]] == [
        "failed", "failed",
    ]  # fmt: skip


@pytest.mark.slow
def test_command_sweeps_and_names_the_next_one(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", str(config), "--set", "training.lr=log:1e-3..1e-1", "--trials", "2", "--out", str(out)]
    result = runner.invoke(simulations.cli.app, [*arguments, "--objective", "metric=1,worst_site=1"])
    assert result.exit_code == 0, result.output
    assert "fedtune-sim compare" in result.stdout
    assert {"sweep.json", "best.yaml", "trials.png", "settings.svg", "report.html"} < {p.name for p in out.iterdir()}
    refused = runner.invoke(simulations.cli.app, [*arguments, "--objective", "accuracy=1"])
    assert refused.exit_code == 2
    assert "worst_site" in refused.stderr
