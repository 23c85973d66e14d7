"""A whole federation in this process, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import client.answers
from common.config.load import load_run_config
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import ConfigError, DataError, RunError
from common.evaluation import Evaluator
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tasks.catalog import TASKS
from server.events import Observer
from server.federation import RunSettings, run_federation
from server.outcome import Outcome
from simulations.check import check_run
from simulations.engines.catalog import open_engine
from simulations.engines.settings import EngineSettings
from simulations.grid import VirtualGrid
from simulations.run import new_run_folder, newest_run_folder, simulate

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StopAfter(Observer):
    """Presses Ctrl-C when the first site of a round has answered."""

    def __init__(self, number: int) -> None:
        self.number = number

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        if number == self.number:
            raise KeyboardInterrupt


def test_run_leaves_every_file_and_a_whole_summary(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(federation={"rounds": 3})
    folder = tmp_path / "run"
    summary = simulate(config, folder)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert load_run_config(folder / "config.yaml") == config
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "MODEL_CARD.md", "adapter", "checkpoint",
    }  # fmt: skip
    assert summary["rounds"] == 3
    assert summary["sites"] == ["site 0", "site 1", "site 2"]
    for part in ("metrics_before", "metrics_after"):
        assert set(summary[part]["test"]["by_site"]) == set(summary["sites"])
    assert {len(per_round) for per_round in summary["bytes_up"].values()} == {3}
    assert summary["seconds_total"] >= summary["seconds_training"] > 0
    assert summary["engine"] == "inprocess, cohorts of 8"
    assert summary["epsilon"] == {}


def test_training_learns_the_tiny_task(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("gpt2", federation={"rounds": 6}, training={"lr": 0.02, "local_epochs": 3})
    summary = simulate(config, tmp_path / "run")
    before, after = (summary[part]["test"]["overall"] for part in ("metrics_before", "metrics_after"))
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"]


def test_exported_adapter_predicts_exactly_as_the_last_evaluation(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(training={"lr": 0.05})
    summary = simulate(config, tmp_path / "run")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.source, num_labels=3)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    test = load_federated_data(config.data, config.seed).test
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.source)
    right = dict.fromkeys(test, 0)
    for site, examples in test.items():
        for row in TASKS["classification"].tokenise(examples, tokenizer, config.data):
            with torch.no_grad():
                logits = again(input_ids=row.input_ids[None]).logits
            right[site] += int(logits.argmax() == row.targets)
    after = summary["metrics_after"]["test"]["by_site"]
    assert {site: count / len(test[site]) for site, count in right.items()} == {
        site: metrics["accuracy"] for site, metrics in after.items()
    }
    model = resident_model(config)
    reloaded = Evaluator(model, config, test)(adapter_of(tmp_path / "run"))
    assert reloaded.overall == summary["metrics_after"]["test"]["overall"]


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE], ids=["no DP", "DP"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_run_ends_on_the_same_bits(
    make_config: Callable[..., RunConfig], tmp_path: Path, privacy: dict[str, Any], stop: int
) -> None:
    config = make_config(privacy=privacy, federation={"rounds": 3}, adapter={"dropout": 0.1})
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfter(stop))
    resumed = simulate(config, tmp_path / "cut", resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut"))
    for key in ("rounds", "metrics_before", "metrics_after", "epsilon", "bytes_down"):
        assert resumed[key] == whole[key]
    assert resumed["starts"] == 2


def test_resume_with_another_config_names_what_differs(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    simulate(make_config(), tmp_path / "run")
    with pytest.raises(RunError, match="differs in training"):
        simulate(make_config(training={"lr": 0.5}), tmp_path / "run", resume=True)


def test_method_changes_the_bytes_and_ffa_never_sends_a(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    both = simulate(make_config(), tmp_path / "fedit")
    half = simulate(make_config(aggregation={"method": "ffa_lora"}), tmp_path / "ffa")
    packed = simulate(make_config(communication={"codec": "bf16"}), tmp_path / "bf16")
    for way in ("bytes_up", "bytes_down"):
        assert half[way]["site 0"][0] < 0.9 * both[way]["site 0"][0]
        assert packed[way]["site 0"][0] < 0.9 * both[way]["site 0"][0]
    checkpoint = next((tmp_path / "ffa" / "checkpoint").glob("*.safetensors"))
    assert not any(".lora_A." in name for name in load_file(checkpoint))
    assert any(".lora_A." in name for name in adapter_of(tmp_path / "ffa"))


def test_head_only_leaves_the_factors_at_zero(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    simulate(make_config(adapter={"kind": "head_only"}), tmp_path / "run")
    adapter = adapter_of(tmp_path / "run")
    assert all(not value.any() for name, value in adapter.items() if ".lora_B." in name)
    assert any(value.any() for name, value in adapter.items() if "classifier.weight" in name)


def test_epsilon_is_charged_to_the_sites_that_were_asked(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=PRIVATE, federation={"rounds": 4, "sites_per_round": 1})
    summary = simulate(config, tmp_path / "run")
    rounds = [r for r in RunFolder(tmp_path / "run").records() if r["kind"] == "round"]
    asked = [site for record in rounds for site in record["sites"]]
    assert set(summary["epsilon"]) == set(asked)
    spent = {asked.count(site): epsilon for site, epsilon in summary["epsilon"].items()}
    assert [spent[count] for count in sorted(spent)] == sorted(spent.values())
    assert all(outcome["train_loss"] is None for record in rounds for outcome in record["sites"].values())


def test_private_text_never_reaches_the_run_folder(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=PRIVATE)
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    rows[0]["text"] = "canaryword the knee hurts"
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    simulate(config, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"canaryword" not in path.read_bytes(), path


def test_run_without_test_part_has_no_metrics(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    summary = simulate(make_config(data={"test": None}), tmp_path / "run")
    assert summary["metrics_before"] == summary["metrics_after"] == {}


def test_causal_model_lowers_its_perplexity(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("llama", "causal_lm", federation={"rounds": 4}, training={"lr": 0.05})
    summary = simulate(config, tmp_path / "run")
    before, after = (summary[part]["test"]["overall"]["perplexity"] for part in ("metrics_before", "metrics_after"))
    assert after < 0.5 * before


def test_site_that_fails_is_reported_by_code_and_ends_the_run_only_below_min_sites(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client.answers.answer_train

    def failing(header: bytes, payload: bytes, site: Any, *rest: Any) -> Any:
        if site.name == "site 1":
            raise DataError("the private text of row 7")
        return real(header, payload, site, *rest)

    monkeypatch.setattr(client.answers, "answer_train", failing)
    alone = EngineSettings(cohort=1)
    simulate(make_config(), tmp_path / "run", engine=alone)
    record = next(r for r in RunFolder(tmp_path / "run").records() if r["kind"] == "round")
    assert record["sites"]["site 1"]["status"] == "rejected"
    assert record["sites"]["site 1"]["reason"].startswith("refused: the site refused with 'data' at")
    assert "private text" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match="2 usable updates; expected at least 3"):
        simulate(make_config(federation={"min_sites": 3}), tmp_path / "strict", engine=alone)


def test_run_with_more_min_sites_than_sites_is_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_sites"):
        simulate(make_config(federation={"min_sites": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strategy_runs_in_flowers_own_loop(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from flwr.serverapp.strategy import Strategy

    from server.strategy import FederatedTuning

    config = make_config()
    simulate(config, tmp_path / "ours")
    grid = VirtualGrid(open_engine(EngineSettings(), config, 3), 3)
    caught: list[FederatedTuning] = []

    def flowers_start(self: FederatedTuning, grid: VirtualGrid, **_: Any) -> Any:
        caught.append(self)
        return Strategy.start(self, grid, self.arrays(), num_rounds=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FederatedTuning, "start", flowers_start)
        run_federation(grid, config, RunSettings(RunFolder(tmp_path / "flower")))
    assert caught[0].completed_rounds == 2
    assert same(adapter_of(tmp_path / "ours"), adapter_of(tmp_path / "flower"))


def test_run_folders_are_numbered_and_the_newest_is_found(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(federation={"rounds": 1})
    names: Sequence[str] = ("tiny", "tiny-2")
    for name in names:
        folder = new_run_folder(config, tmp_path / "runs")
        assert folder.name == name
        simulate(config, folder)
    assert newest_run_folder(config, tmp_path / "runs").name == "tiny-2"
    with pytest.raises(RunError, match="Run without --resume"):
        newest_run_folder(config, tmp_path / "elsewhere")


def test_check_tells_of_too_few_sites_for_a_rule(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(RunError, match=r"a round has 3 sites .* against 1 bad ones needs 5"):
        check_run(make_config(aggregation={"robust": "krum"}))
    assert check_run(make_config(aggregation={"robust": "median"}))["rounds"] > 0


def test_check_plans_what_the_run_then_does(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(privacy=PRIVATE)
    plan = check_run(config)
    summary = simulate(config, tmp_path / "run")
    record = next(r for r in RunFolder(tmp_path / "run").records() if r["kind"] == "round")
    for site, planned in plan["sites"].items():
        assert record["sites"][site]["steps"] == planned["steps_per_round"]
        assert summary["epsilon"][site] == pytest.approx(planned["epsilon_after_run"])
        headers = summary["bytes_up"][site][0] - plan["bytes_per_site_and_round"]["up"]
        assert 0 < headers < 1000
