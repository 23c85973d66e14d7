"""The policy: each limit at its edge, hours of the day, and what a site config may say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from client.ledger.spending import charge_of, epsilon_of
from client.policy.rules import RULES, expect_open, expect_plan, expect_run, expect_run_spend
from client.policy.section import Policy
from client.site_config import Budget
from common.config.run import RunConfig
from common.errors import PolicyError
from common.privacy.planning import Mechanism

MakeConfig = Callable[..., RunConfig]
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sample_rate": 0.1}
BUDGET = Budget(epsilon=50.0)


def policy(**keys: Any) -> Policy:
    return Policy.model_validate(keys)


def mechanism(noise: float = 1.0, rate: float = 0.1, steps: int = 5) -> Mechanism:
    return Mechanism(
        noise_multiplier=noise, clip_norm=1.0, sample_rate=rate, expected_batch_size=4.0, steps_per_round=steps,
        delta=1e-4, accountant="prv",
    )  # fmt: skip


def test_rules_name_keys_that_a_run_config_has() -> None:
    for key in RULES:
        section, name = key.split(".")
        annotation = RunConfig.model_fields[section].annotation
        assert name in annotation.model_fields, key  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("within", "beyond", "sections", "key"),
    [
        ({"largest_rank": 2}, {"largest_rank": 1}, {}, "adapter.rank"),
        ({"adapters": ["lora"]}, {"adapters": ["head_only", "prompt"]}, {}, "adapter.kind"),
        ({"largest_virtual_tokens": 8}, {"largest_virtual_tokens": 7}, {"adapter": {"kind": "prompt"}},
         "adapter.virtual_tokens"),
        ({"methods": ["fedit", "flora"]}, {"methods": ["flora"]}, {}, "aggregation.method"),
        ({"tasks": ["classification"]}, {"tasks": ["causal_lm"]}, {}, "data.task"),
        ({"largest_rounds": 2}, {"largest_rounds": 1}, {}, "federation.rounds"),
        ({"largest_steps_per_round": 9}, {"largest_steps_per_round": 8}, {"training": {"local_steps": 9}},
         "training.local_steps"),
        ({"least_noise_multiplier": 1.0}, {"least_noise_multiplier": 1.001}, {}, "privacy.noise_multiplier"),
        ({"largest_delta": 1e-4}, {"largest_delta": 9e-5}, {}, "privacy.delta"),
        ({"metrics": ["train_loss"]}, {}, {"privacy": PRIVATE | {"release_loss": True}}, "privacy.release_loss"),
        ({"metrics": ["clip_norm"]}, {"metrics": ["train_loss"]}, {"privacy": PRIVATE | {"clipping": "adaptive"}},
         "privacy.clipping"),
    ],
)  # fmt: skip
def test_limit_holds_at_its_edge(
    make_config: MakeConfig, within: dict[str, Any], beyond: dict[str, Any], sections: dict[str, Any], key: str
) -> None:
    config = make_config(**{"privacy": PRIVATE} | sections)
    expect_run(policy(**within), config)
    with pytest.raises(PolicyError, match=f"^{key} of the run is .*; expected .*policy") as caught:
        expect_run(policy(**beyond), config)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_base_model_goes_by_its_name_where_the_policy_names_one(make_config: MakeConfig) -> None:
    config = make_config(privacy=PRIVATE)
    rule = {"sha256": "0" * 64}
    expect_run(policy(base_models=[rule | {"id": config.model.source}]), config)
    expect_run(policy(base_models=[rule | {"id": "other"}, rule]), config)
    with pytest.raises(PolicyError, match=r"^model\.source of the run"):
        expect_run(policy(base_models=[rule | {"id": "other"}]), config)


def test_plan_is_held_to_noise_steps_and_epsilon_of_the_whole_run(make_config: MakeConfig) -> None:
    config = make_config(privacy=PRIVATE, federation={"rounds": 4})
    whole = epsilon_of([charge_of(mechanism(), 4)], BUDGET)
    expect_plan(policy(epsilon_per_run=whole, least_noise_multiplier=1.0, largest_steps_per_round=5), config,
                mechanism(), BUDGET)  # fmt: skip
    for limits, key in (
        ({"epsilon_per_run": whole * 0.999}, "privacy.noise_multiplier"),
        ({"least_noise_multiplier": 1.01}, "privacy.noise_multiplier"),
        ({"largest_steps_per_round": 4}, "training.local_epochs"),
    ):
        with pytest.raises(PolicyError) as caught:
            expect_plan(policy(**limits), config, mechanism(), BUDGET)
        assert caught.value.key == key


def test_epsilon_of_a_run_is_that_of_all_its_rounds_by_the_ledger() -> None:
    charge = charge_of(mechanism())
    both = epsilon_of([charge, charge], BUDGET)
    expect_run_spend(policy(epsilon_per_run=both), [charge, charge], BUDGET)
    expect_run_spend(policy(), [charge] * 3, BUDGET)
    with pytest.raises(PolicyError, match="with this round"):
        expect_run_spend(policy(epsilon_per_run=both), [charge, charge, charge], BUDGET)


@pytest.mark.parametrize(
    ("hours", "open_at", "closed_at"),
    [
        (None, ["00:00", "12:34", "23:59"], []),
        ("08:00-17:30", ["08:00", "12:00", "17:30"], ["07:59", "17:31", "00:00"]),
        ("20:00-06:00", ["20:00", "23:59", "00:00", "06:00"], ["19:59", "06:01", "12:00"]),
    ],
)
def test_hours_of_the_day(hours: str | None, open_at: list[str], closed_at: list[str]) -> None:
    for text in open_at:
        expect_open(policy(hours=hours), datetime.fromisoformat(f"2030-01-01T{text}"))
    for text in closed_at:
        with pytest.raises(PolicyError, match=r"policy\.hours") as caught:
            expect_open(policy(hours=hours), datetime.fromisoformat(f"2030-01-01T{text}"))
        assert caught.value.code == "paused"


def test_paused_site_answers_nothing() -> None:
    with pytest.raises(PolicyError, match="paused") as caught:
        expect_open(policy(pause=True), datetime(2030, 1, 1))
    assert (caught.value.code, caught.value.key) == ("paused", "policy.pause")


@pytest.mark.parametrize(
    "keys",
    [{"hours": "8-17"}, {"hours": "24:00-01:00"}, {"hours": "08:00-08:00"}, {"metrics": ["accuracy"]},
     {"tasks": []}, {"largest_rank": 0}, {"base_models": [{"sha256": "x"}]}, {"least_noise": 1.0}],
)  # fmt: skip
def test_policy_of_other_keys_or_values_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        policy(**keys)
