"""A hostile coordinator mutates every key of a run config: nothing is loosened, and each refusal names its key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from client.ledger.spending import charge_of, epsilon_of
from client.policy.section import Policy
from client.site import read_site_rows
from client.site_config import load_site_config
from common.config.load import dump_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.privacy.planning import plan_mechanism
from common.wire import Refusal, SiteDescription, TrainReply
from tests.client.real_sites import RealSite

MakeSite = Callable[..., RealSite]
PRIVATE = {"unit": "example", "noise_multiplier": 2.0, "delta": 1e-4, "sample_rate": 0.2, "accountant": "rdp"}
RUN = {"training": {"local_steps": 2}, "federation": {"rounds": 2}}

REFUSED: dict[str, list[Any]] = {
    "model.source": ["hub:owner/other"],
    "adapter.kind": ["prompt"],
    "adapter.rank": [3, 65536],
    "adapter.target_modules": ["all-linear"],
    "data.task": ["causal_lm"],
    "data.labels": [["skin", "heart", "bones"]],
    "data.text_field": ["patient"],
    "data.label_field": ["patient"],
    "data.person_field": ["text"],
    "training.local_steps": [3, 10**6],
    "training.local_epochs": [50.0],
    "training.batch_size": [20],
    "training.control_variates": [True],
    "privacy.unit": ["none", "site"],
    "privacy.epsilon": [100.0],
    "privacy.delta": [0.4],
    "privacy.noise_multiplier": [1.999, 1e-6, 0.0],
    "privacy.sample_rate": [0.21, 1.0],
    "privacy.clipping": ["adaptive"],
    "privacy.release_loss": [True],
    "federation.rounds": [3, 10**6],
    "aggregation.method": ["flora", "fedsvd"],
    "aggregation.weights": ["examples"],
    "aggregation.max_weight": [1.0],
    "communication.top_k": [0.01],
    "simulation": [{}],
}
"""What a site refuses, by key, and values that ask for less privacy, for more of the site, or for other rows."""

TOGETHER: dict[str, dict[str, Any]] = {
    "model.source": {"model.revision": "0" * 40},
    "data.task": {"data.labels": None},
    "data.person_field": {"privacy.unit": "user"},
    "training.local_epochs": {"training.local_steps": None},
    "training.batch_size": {"privacy.sample_rate": None},
    "privacy.unit": {"privacy.sample_rate": None},
    "privacy.epsilon": {"privacy.noise_multiplier": None},
    "federation.mode": {"federation.buffer_size": 1},
    "federation.buffer_size": {"federation.mode": "async"},
    "federation.over_select": {"federation.sites_per_round": 1},
}
"""What else a mutation needs so that the config itself is valid."""

WITHOUT_EFFECT: dict[str, Any] = {
    "name": "other",
    "seed": 7,
    "model.revision": None,
    "model.dtype": "fp32",
    "model.quantization": "none",
    "model.pooling": "mean",
    "model.gradient_checkpointing": False,
    "adapter.virtual_tokens": 1024,
    "adapter.alpha": 1e6,
    "adapter.dropout": 0.5,
    "data.train": "/etc/passwd",
    "data.test": "/etc/passwd",
    "data.test_fraction": 0.0,
    "data.revision": "0" * 40,
    "data.prompt_template": "{prompt} tell me all",
    "data.max_length": 131072,
    "data.max_rows_per_site": 1,
    "data.max_test_rows": 1,
    "data.partition": {"kind": "iid", "sites": 1},
    "training.optimizer": "sgd",
    "training.lr": 1e6,
    "training.head_lr": 1e6,
    "training.weight_decay": 100.0,
    "training.momentum": 0.0,
    "training.schedule": "linear",
    "training.warmup": 0.5,
    "training.max_grad_norm": None,
    "training.proximal_mu": 100.0,
    "training.micro_batch_size": 1,
    "privacy.clip_norm": 1e6,
    "privacy.clip_quantile": 0.9,
    "privacy.clip_lr": 0.5,
    "privacy.quantile_share": 0.4,
    "privacy.loss_share": 0.5,
    "privacy.loss_bound": 1e3,
    "privacy.accountant": "prv",
    "privacy.site_level": {"noise_multiplier": 1e-3},
    "aggregation.max_update_norm": 1e9,
    "aggregation.norm_bound_of_median": 100.0,
    "federation.sites_per_round": 1,
    "federation.min_sites": 1,
    "federation.round_timeout_s": 1e9,
    "federation.join_timeout_s": 1e9,
    "federation.virtual_ranks": [65536],
    "aggregation.residual_penalty": 1e-9,
    "aggregation.robust": "median",
    "aggregation.robust_sites": 0,
    "aggregation.server_optimizer": "fedadam",
    "aggregation.server_lr": 1e6,
    "aggregation.server_beta1": 0.0,
    "aggregation.server_beta2": 0.0,
    "aggregation.server_tau": 1e-9,
    "communication.codec": "bf16",
    "communication.down": "bf16",
    "communication.block": 4096,
    "communication.zstd": 19,
    "federation.mode": "async",
    "federation.buffer_size": 1,
    "federation.over_select": 10.0,
    "federation.below_min": "extend",
    "federation.extension_s": 1e9,
    "federation.late": "carry",
    "federation.max_staleness": 16,
    "federation.staleness_exponent": 0.0,
    "evaluation.every": 0,
    "evaluation.enabled": False,
    "evaluation.products": False,
}
"""What changes nothing of a site's guarantee: noise, rate, steps, rows and what leaves stay those of the plan."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Keys of a run config; a section within a section counts as one key."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if not prefix and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{name}.")
        else:
            yield f"{prefix}{name}"


def mutated(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    values = config.model_dump(exclude={"simulation"})
    for key, value in changes.items():
        section, _, name = key.partition(".")
        place = values if not name else values[section]
        place[name or section] = value
    return RunConfig.model_validate(values)


@pytest.fixture
def site(make_site: MakeSite) -> RealSite:
    """A site whose policy allows the run as it is and not a bit more."""
    made = make_site(PRIVATE, **RUN)
    own = made.own_model()
    numbers = sum(parameter.numel() for parameter in own.parameters.values())
    mechanism = plan_mechanism(made.config, 24)
    assert mechanism is not None
    made.write(policy={
        "base_models": [{"sha256": own.base.fingerprint, "id": made.config.model.source}],
        "tasks": ["classification"], "adapters": ["lora"], "methods": ["fedit"], "largest_rank": 2,
        "largest_parameters": numbers, "least_noise_multiplier": 2.0, "largest_delta": 1e-4, "largest_rounds": 2,
        "largest_steps_per_round": 2,
        "epsilon_per_run": epsilon_of([charge_of(mechanism, 2)], load_site_config(made.path).budget),
    })  # fmt: skip
    return made


def test_every_key_of_a_run_config_is_mutated() -> None:
    assert REFUSED.keys() | WITHOUT_EFFECT.keys() == set(keys_of(RunConfig))
    assert not REFUSED.keys() & WITHOUT_EFFECT.keys()


def test_policy_allows_the_run_as_it_is(site: RealSite) -> None:
    assert isinstance(site.describe(), SiteDescription)
    assert isinstance(site.train(1)[0], TrainReply)


def test_every_mutation_towards_less_privacy_is_refused_by_key(
    site: RealSite, caplog: pytest.LogCaptureFixture
) -> None:
    honest = site.config
    for key, values in REFUSED.items():
        for value in values:
            try:
                site.config = mutated(honest, {key: value} | TOGETHER.get(key, {}))
            except ValueError:  # no valid run config at all: it is sent as text, since a hostile side checks nothing
                site.flower_config = {"config-yaml": forged(honest, key, value)}
            caplog.clear()
            with caplog.at_level(logging.ERROR, "client.agent.resident"):
                replies = (site.describe(), site.train(1)[0])
            assert all(isinstance(reply, Refusal) for reply in replies), (key, value)
            assert key.rpartition(".")[2] in caplog.text, (key, value, caplog.text)
            assert caplog.text.count("refused: ") == 2
            site.flower_config, site.config = {}, honest
    assert not site.ledger.history().entries


def forged(config: RunConfig, key: str, value: Any) -> str:
    """The text of a run config that this side's own schema would not have let through."""
    import yaml

    values = yaml.safe_load(dump_run_config(config))
    section, _, name = key.partition(".")
    (values if not name else values[section])[name or section] = value
    return yaml.safe_dump(values)


def test_no_other_key_changes_what_a_site_guarantees(site: RealSite) -> None:
    own, honest = load_site_config(site.path), site.config
    planned = plan_mechanism(honest, 24)
    assert planned is not None
    rows = read_site_rows(honest, own)
    for key, value in WITHOUT_EFFECT.items():
        config = mutated(honest, {key: value} | TOGETHER.get(key, {}))
        found = plan_mechanism(config, 24)
        assert found is not None
        assert charge_of(found) == charge_of(planned), key
        assert (found.loss_share, found.quantile_share) == (0.0, 0.0), key
        read = read_site_rows(config, own)
        assert (read.examples, read.persons) == (rows.examples, rows.persons), key


@pytest.mark.parametrize("key", ["learning", "privacy.noise", "model.path", "policy", "budget"])
def test_unknown_key_is_refused(site: RealSite, caplog: pytest.LogCaptureFixture, key: str) -> None:
    site.flower_config = {"config-yaml": forged(site.config, key, 1)}
    reply = site.describe()
    assert isinstance(reply, Refusal)
    assert reply.code == ConfigError.code
    assert f"unknown key {key!r}" in caplog.text


def test_refusal_by_policy_tells_the_key_and_no_figure_of_the_site(site: RealSite) -> None:
    site.config = mutated(site.config, {"federation.rounds": 3})
    assert site.describe() == Refusal(code="policy", place="federation.rounds")


def test_one_run_cannot_spend_more_than_a_run_by_coming_with_two_configs(site: RealSite) -> None:
    honest = site.config
    assert isinstance(site.train(1)[0], TrainReply)
    site.config = mutated(honest, {"seed": 1})
    assert isinstance(site.train(2)[0], TrainReply)
    site.write(policy={"epsilon_per_run": load_site_config(site.path).policy.epsilon_per_run})
    site.config = mutated(honest, {"federation.rounds": 3, "privacy.noise_multiplier": 9.0})
    assert site.train(3)[0] == Refusal(code="policy", place="federation.rounds")
    assert len(site.ledger.history().entries) == 2


def test_pause_holds_from_the_next_message_on(site: RealSite) -> None:
    policy = site.values["policy"]
    assert isinstance(site.describe(), SiteDescription)
    site.write(policy=policy | {"pause": True})
    assert site.describe() == Refusal(code="paused", place="policy.pause")
    assert site.train(1)[0] == Refusal(code="paused", place="policy.pause")
    site.write(policy=policy)
    assert isinstance(site.train(1)[0], TrainReply)


def test_site_whose_own_model_is_not_the_allowed_one_trains_nothing(
    site: RealSite, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: value.clone() for name, value in site.own_model().state().items()}
    site.write(policy={"base_models": [{"sha256": "0" * 64}]})
    reply, _ = site.train(1)
    assert reply == Refusal(code="policy", place="model.source")
    assert "policy.base_models" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in site.own_model().state().items())


def test_default_policy_lets_no_metric_leave() -> None:
    assert Policy().metrics == ()
