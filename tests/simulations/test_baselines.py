"""Baselines: a site alone is a federation of one, the pool does the work of all, gains by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import client.site
import simulations.cli
from client.training.site_round import local_batches
from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from common.config.warnings import config_warnings
from common.data.federated import load_federated_data
from common.errors import ConfigError
from common.evaluation import Evaluator
from common.factor_names import is_factor
from common.factors import with_rank
from common.methods import METHODS
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plain_steps, plan_mechanism
from common.run_folder import RunFolder
from server.checkpoint import load_checkpoint
from simulations.baselines.alone import POOLED, alone_config, pooled_config, pooled_site, train_alone
from simulations.baselines.baselines import run_baselines
from simulations.baselines.scores import Scores, each_at_home, load_scores, save_scores
from simulations.baselines.work import baseline_configs, do_work, plan_work, scores_of
from simulations.run import simulate
from simulations.study.runs import HERE, unwatched
from tests.conftest import config_text, label_rows, write_rows

runner = CliRunner()
PRIVATE = {"unit": "example", "epsilon": 8.0, "accountant": "rdp", "sample_rate": 0.25}


@pytest.mark.parametrize(
    "sections",
    [
        {"privacy": PRIVATE | {"clipping": "adaptive"}},
        {"aggregation": {"method": "hetlora"}, "federation": {"virtual_ranks": [1]}},
        *({"aggregation": {"method": method}} for method in sorted(METHODS.keys() - {"flora", "flexlora", "fedsvd"})),
    ],
    ids=lambda sections: "-".join(str(value) for keys in sections.values() for value in keys.values())[:24],
)
def test_site_alone_is_a_federation_of_one(
    make_config: Callable[..., RunConfig], tmp_path: Path, sections: dict[str, dict[str, object]]
) -> None:
    federation = {"rounds": 3} | sections.get("federation", {})
    config = make_config(**(sections | {"federation": federation, "training": {"schedule": "cosine"}}))
    write_rows(tmp_path / "train.jsonl", label_rows(24, sites=1))
    simulate(config, tmp_path / "run")
    model = resident_model(config)
    start = initial_adapter(model, config.seed)
    site = client.site.virtual_site(config, {"partition-id": 0, "num-partitions": 1}, model)
    alone = train_alone(model, site, config, start)
    assert alone.keys() == start.keys()
    rank = site.max_rank or config.adapter.rank
    joined = with_rank(load_checkpoint(RunFolder(tmp_path / "run").checkpoint).adapter, rank)
    kept = joined.keys() & alone.keys()
    assert any(not torch.equal(alone[name], with_rank(start, rank)[name]) for name in kept)
    for name in kept:
        torch.testing.assert_close(alone[name], joined[name], rtol=1e-5, atol=1e-7)


def test_pool_takes_the_steps_of_all_sites(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    data = load_federated_data(config.data, config.seed)
    pooled = pooled_config(config, data)
    assert pooled.training.local_steps == 3 * 3  # three sites of twelve rows in batches of four
    site = pooled_site(pooled, data, resident_model(config))
    assert (site.name, len(site.rows)) == (POOLED, 36)


@pytest.mark.parametrize(
    ("rows", "sites", "training", "steps", "batch"),
    [
        (96, 12, {"batch_size": 16}, 12, 8),  # every site has half a batch
        (60, 3, {"batch_size": 16}, 6, 10),  # a batch and a quarter
        (60, 3, {"batch_size": 16, "local_epochs": 2}, 12, 10),
        (60, 3, {"batch_size": 16, "local_steps": 3}, 9, 12),  # 16, 4 and again 16 rows at each
        (60, 3, {"batch_size": 20}, 3, 20),
    ],
)
def test_pool_sees_every_row_as_often(
    make_config: Callable[..., RunConfig], tmp_path: Path, rows: int, sites: int, training: dict[str, object],
    steps: int, batch: int,
) -> None:  # fmt: skip
    config = make_config(training=training)
    write_rows(tmp_path / "train.jsonl", label_rows(rows, sites=sites))
    data = load_federated_data(config.data, config.seed)
    pooled = pooled_config(config, data)
    assert (pooled.training.local_steps, pooled.training.batch_size) == (steps, batch)
    model = resident_model(config)
    seen = sum(len(rows) for rows in local_batches(pooled_site(pooled, data, model), pooled, 1, steps, None))
    apart = 0
    for number in range(sites):
        site = client.site.virtual_site(config, {"partition-id": number, "num-partitions": sites}, model)
        own = plain_steps(config, len(site.rows))
        apart += sum(len(rows) for rows in local_batches(site, config, 1, own, None))
    assert seen == apart


@pytest.mark.parametrize(
    "federation",
    [
        {"sites_per_round": 2, "over_select": 1.5},
        {"mode": "async", "buffer_size": 2},
        {"late": "carry", "max_staleness": 3, "below_min": "extend", "extension_s": 5.0},
    ],
)
def test_baselines_go_with_any_way_of_running_rounds(
    make_config: Callable[..., RunConfig], federation: dict[str, Any]
) -> None:
    config = make_config(federation=federation)
    assert config_warnings(pooled_config(config, load_federated_data(config.data, config.seed))) == ()


def test_head_alone_has_no_settings_of_a_method(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(aggregation={"method": "lora_fair", "residual_penalty": 0.5})
    assert config_warnings(baseline_configs(config)["head_only"]) == ()


def test_private_pool_sees_every_row_as_often_and_keeps_epsilon(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy=PRIVATE)
    data = load_federated_data(config.data, config.seed)
    pooled = pooled_config(config, data)
    own, mechanism = plan_mechanism(config, 12), plan_mechanism(pooled, 36)
    assert own is not None
    assert mechanism is not None
    assert mechanism.steps_per_round == 3 * own.steps_per_round
    assert mechanism.sample_rate * mechanism.steps_per_round == pytest.approx(own.sample_rate * own.steps_per_round)
    assert mechanism.expected_batch_size == pytest.approx(own.expected_batch_size)
    assert mechanism.epsilon_after(config.federation.rounds) <= 8.0
    # Noise on a step's mean is smaller than that of a site alone: one of more rows is easier to hide.
    assert mechanism.noise_multiplier < own.noise_multiplier


def test_site_level_privacy_is_for_those_who_join(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "site", "epsilon": 8.0})
    assert alone_config(config).privacy.unit == "none"
    both = make_config(privacy=PRIVATE | {"site_level": {"epsilon": 8.0}})
    assert alone_config(both).privacy == make_config(privacy=PRIVATE).privacy
    with_head = baseline_configs(make_config())
    assert with_head["head_only"].adapter.kind == "head_only"
    assert "head_only" not in baseline_configs(make_config(adapter={"kind": "head_only"}))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_head_alone_is_averaged_whatever_the_method(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    mixed = {"virtual_ranks": (1, 2)} if METHODS[method].mixed_ranks else {}
    config = make_config(aggregation={"method": method}, adapter={"rank": 2, "dropout": 0.1}, federation=mixed)
    head = baseline_configs(config)["head_only"]
    assert (head.adapter.kind, head.aggregation.method, head.federation.virtual_ranks) == ("head_only", "fedit", ())
    assert (head.data, head.model, head.training, head.privacy) == (
        config.data, config.model, config.training, config.privacy,
    )  # fmt: skip
    assert parse_run_config(dump_run_config(head), "head", None) == head  # as a site reads it
    if method == "ffa_lora":
        simulate(head, tmp_path / "run")
        adapter = load_checkpoint(RunFolder(tmp_path / "run").checkpoint).adapter
        assert adapter
        assert not any(is_factor(name) for name in adapter)


def test_joined_sites_are_scored_with_what_they_keep(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(aggregation={"method": "fedsa_lora"}, training={"lr": 0.1})
    (joined,) = work = plan_work({"joined": config}, [0], tmp_path / "out")
    do_work(work, tmp_path / "out", compute=HERE, watching=unwatched, saying=lambda _: None)
    evaluation = RunFolder(tmp_path / "out" / "runs" / "joined--0").records()[-1]
    assert (evaluation["kind"], evaluation["round"]) == ("evaluation", 2)
    scores = scores_of(joined)
    assert scores.metrics() == pytest.approx(evaluation["metrics"]["overall"])
    for site, metrics in evaluation["metrics"]["by_site"].items():
        assert scores.metrics(site) == pytest.approx(metrics)


def test_row_sums_add_up_to_the_metrics(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    model, test = resident_model(config), load_federated_data(config.data, config.seed).test
    evaluator = Evaluator(model, config, test)
    start = initial_adapter(model, config.seed)
    sums, evaluation = evaluator.row_sums(start), evaluator(start)
    save_scores(tmp_path / "scores.safetensors", sums, config)
    scores = load_scores(tmp_path / "scores.safetensors", config, evaluator.owners)
    assert scores.metrics() == pytest.approx(evaluation.overall)
    for site, metrics in evaluation.by_site.items():
        assert scores.metrics(site) == pytest.approx(metrics)
    with pytest.raises(ConfigError, match="another config"):
        load_scores(tmp_path / "scores.safetensors", config.model_copy(update={"seed": 1}), evaluator.owners)


def test_each_row_is_answered_at_home() -> None:
    owners = ("a", "b", "a", "c")
    tables = {
        site: Scores("classification", np.full((4, 3), value), owners) for site, value in (("a", 1.0), ("b", 2.0))
    }
    home = each_at_home(tables)
    assert home.owners == ("a", "b", "a")
    assert home.sums[:, 0].tolist() == [1.0, 2.0, 1.0]


@pytest.mark.slow
def test_gains_are_counted_row_by_row_and_resume_repeats_nothing(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(training={"lr": 0.03, "local_epochs": 2})
    configs = baseline_configs(config)
    figures = run_baselines(configs, [0, 1], tmp_path / "out")
    model, data = resident_model(config), load_federated_data(config.data, 0)
    rates = []
    for seed in (0, 1):
        seeded = config.model_copy(update={"seed": seed})
        start = initial_adapter(model, seed)
        joined = {
            **start,
            **load_checkpoint(RunFolder(tmp_path / "out" / "runs" / f"joined--{seed}").checkpoint).adapter,
        }
        site = client.site.virtual_site(seeded, {"partition-id": 1, "num-partitions": 3}, model)
        alone = train_alone(model, site, seeded, start)
        own = Evaluator(model, seeded, {"site 1": data.test["site 1"]})
        rates.append(own(joined).overall["accuracy"] - own(alone).overall["accuracy"])
    assert figures["sites"]["site 1"]["gain"]["value"] == pytest.approx(100 * sum(rates) / 2)
    assert figures["same_test_rows"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert run_baselines(configs, [0, 1], tmp_path / "out") == figures
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (tmp_path / "out" / "scores" / "alone-1--0.safetensors").unlink()
    assert run_baselines(configs, [0, 1], tmp_path / "out") == figures


@pytest.mark.slow
def test_command_answers_for_a_language_model_too(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    config = tmp_path / "lm.yaml"
    config.write_text(config_text(tmp_path, tiny_models["gpt2"], "causal_lm"))
    out = tmp_path / "out"
    arguments = ["baselines", str(config), "--out", str(out), "--change", "alone:training.lr=0.05", "--json"]
    result = runner.invoke(simulations.cli.app, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["gain_overall"]["base"]["verdict"] == "joining"
    assert "head_only" not in figures["titles"]
    assert all(found["gain"]["p"] is None for found in figures["sites"].values())
    assert {"gain.png", "levels.png", "report.html"} < {path.name for path in out.iterdir()}
    refused = runner.invoke(simulations.cli.app, ["baselines", str(config), "--change", "joined:training.lr=1"])
    assert refused.exit_code == 2
    assert "expected one of alone, pooled" in refused.stderr


def test_config_without_test_part_is_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    configs = baseline_configs(make_config(data={"test": None}))
    with pytest.raises(ConfigError, match="no test part"):
        run_baselines(configs, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
