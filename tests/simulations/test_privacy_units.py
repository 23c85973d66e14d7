"""Whole runs with persons as the unit, adaptive clipping and a released loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.privacy.advice import advise, signal_to_noise
from common.privacy.claim import privacy_claim
from common.privacy.planning import plan_mechanism
from server.events import Observer
from simulations.check import check_run
from simulations.run import simulate
from tests.conftest import label_rows, write_rows
from tests.mechanisms import mechanism_of

USER = {"unit": "user", "noise_multiplier": 1.0, "sample_rate": 0.5}


def person_config(make_config: Callable[..., RunConfig], folder: Path, /, **sections: Any) -> RunConfig:
    """A config on rows of four persons a site, three rows each."""
    rows = [{**row, "patient": index // 3 % 4} for index, row in enumerate(label_rows(36))]
    data = {"train": str(write_rows(folder / "persons.jsonl", rows)), "person_field": "patient"}
    test = [{**row, "patient": "x"} for row in label_rows(12)]
    data["test"] = str(write_rows(folder / "persons-test.jsonl", test))
    return make_config(**{"data": data, "privacy": USER, **sections})


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "round"]


def test_user_level_run_plans_by_person_and_does_not_depend_on_micro_batches(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    adapters = []
    for size in (1, 2, 64):
        config = person_config(make_config, tmp_path, training={"micro_batch_size": size, "optimizer": "sgd"})
        summary = simulate(config, tmp_path / str(size))
        adapters.append(adapter_of(tmp_path / str(size)))
    mechanism = plan_mechanism(config, 4)
    assert mechanism is not None
    assert mechanism.expected_batch_size == 2.0
    assert summary["epsilon"]["site 0"] == pytest.approx(mechanism.epsilon_after(2))
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapters[2][name], value, rtol=1e-4, atol=1e-5)


def test_check_counts_persons_and_says_what_is_claimed(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    plan = check_run(person_config(make_config, tmp_path))
    assert plan["sites"]["site 0"]["persons"] == 4
    assert "User-level" in plan["privacy_claim"]
    assert any("too few" in sentence for sentence in plan["advice"])


def test_user_unit_needs_a_person_in_every_row(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.person_field"):
        make_config(privacy=USER)
    config = make_config(privacy=USER, data={"person_field": "patient"})
    with pytest.raises(DataError, match="'patient' names no person") as caught:
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "line 1" in str(caught.value)


@pytest.mark.parametrize("key", ["sample_rate", "clipping", "release_loss", "site_level"])
@pytest.mark.parametrize("unit", ["none", "site"])
def test_keys_of_local_privacy_are_refused_without_it(
    make_config: Callable[..., RunConfig], key: str, unit: str
) -> None:
    value: dict[str, Any] = {
        "sample_rate": 0.1, "clipping": "adaptive", "release_loss": True, "site_level": {"epsilon": 1},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=key):
        make_config(privacy={"unit": unit, key: value[key]})


@pytest.mark.parametrize(
    ("privacy", "rule"),
    [
        ({"clipping": "adaptive", "site_level": {"epsilon": 1}}, "site_level does not cover"),
        ({"clipping": "adaptive", "quantile_share": 0.5, "release_loss": True, "loss_share": 0.5}, r"at most 0\.9"),
        ({"clip_norm": 1e-30}, r"greater than or equal to 0\.00000001"),
    ],
)
def test_settings_that_would_void_a_guarantee_are_refused(
    make_config: Callable[..., RunConfig], privacy: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_config(privacy={"unit": "example", **privacy})


class StopAfterOne(Observer):
    """Interrupts a run after its first round."""

    def round_ended(self, record: dict[str, Any], epsilon: float | None) -> None:
        """Stop."""
        raise KeyboardInterrupt


def test_adaptive_clip_norm_goes_on_from_round_to_round_and_over_a_resume(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    privacy = {"unit": "example", "noise_multiplier": 0.8, "clipping": "adaptive", "clip_norm": 50.0}
    config = make_config(privacy=privacy, federation={"rounds": 3}, training={"local_steps": 8})
    simulate(config, tmp_path / "whole")
    state = json.loads((tmp_path / "whole" / "checkpoint" / "state.json").read_text())
    assert 1e-8 < state["clip_norm"] < 25.0
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfterOne())
    simulate(config, tmp_path / "cut", resume=True)
    whole, cut = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_loss_is_told_only_when_released_and_its_noise_is_in_the_budget(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0}
    released = make_config(privacy={**privacy, "release_loss": True})
    epsilons = []
    for name, config in (("withheld", make_config(privacy=privacy)), ("released", released)):
        epsilons.append(simulate(config, tmp_path / name)["epsilon"])
        losses = [o["train_loss"] for record in rounds_of(tmp_path / name) for o in record["sites"].values()]
        assert [loss is None for loss in losses] == [name == "withheld"] * len(losses)
    assert epsilons[0] == epsilons[1]
    assert "noisy training loss" in privacy_claim(released, repeatable_noise=True)


def test_advice_names_what_is_wrong_and_is_silent_where_nothing_is(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy={"unit": "example"})
    good = mechanism_of(noise=1.0, rate=0.1, expected=200.0, steps=10)
    assert advise(config, good, 2000, 800) == ()
    assert signal_to_noise(good, 2, 800, 4) == pytest.approx(2 * signal_to_noise(good, 2, 800))
    hopeless = mechanism_of(noise=8.0, rate=0.001, expected=1.0, steps=10)
    slow = make_config(privacy={"unit": "example"}, training={"lr": 1e-4})
    text = " ".join(advise(slow, hopeless, 1000, 100_000))
    for words in ("sample rate is 0.001", "hardly learn", "head_only", "too low a rate"):
        assert words in text
    assert "too few" in " ".join(advise(config, good, 20))
