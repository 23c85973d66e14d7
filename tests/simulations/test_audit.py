"""The privacy audit: its bound against known values and simulation, its canaries, and whole audits on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from typer.testing import CliRunner

import client.answers
import simulations.cli
from common.config.run import RunConfig
from common.data.federated import FederatedData, load_federated_data
from common.errors import ConfigError, DataError, RunError
from common.models.resident import resident_model
from common.randomness import CryptoStream
from simulations.audit import audit as audit_module
from simulations.audit.audit import AuditOptions, run_audit
from simulations.audit.bound import GuessPlan, epsilon_lower_bound, p_value, plan_guesses
from simulations.audit.canaries import Canaries, audited_config, make_canaries, write_rows
from simulations.audit.membership import measure_membership, roc
from simulations.audit.scores import _weights
from simulations.study import extra
from tests.conftest import LABELS, config_text
from tests.conftest import write_rows as write_jsonl

PRIVATE = {"unit": "example", "epsilon": 1.0, "accountant": "rdp", "sample_rate": 1.0}
SMALL = {
    "privacy": PRIVATE,
    "adapter": {"rank": 1, "target_modules": "all-linear"},
    "aggregation": {"method": "ffa_lora"},
    "training": {"optimizer": "sgd", "lr": 0.1, "local_steps": 1},
    "federation": {"rounds": 1},
}
WIDE = SMALL | {"adapter": {"rank": 8, "target_modules": "all-linear"}}
QUICK = AuditOptions(canaries=40, guesses=40, seed=3)


def one_site(config: RunConfig) -> RunConfig:
    """The config with two sites of few rows, and test rows that are no training rows."""
    words = ["rash itch", "knee hip", "pulse beat", "mole", "ankle", "chest"]
    rows = [{"text": f"{w} {i}", "label": LABELS[i % 3], "site": f"site {i % 2}"} for i, w in enumerate(words)]
    other = [row | {"text": f"since {row['text']} night"} for row in rows]
    write_jsonl(Path(config.data.train), rows)
    write_jsonl(Path(str(config.data.test)), other)
    load_federated_data.cache_clear()
    return config


@pytest.mark.parametrize(
    ("correct", "guesses", "canaries", "delta", "published"),
    [
        (100, 100, 100, 0.0, math.log(0.05**0.01 / (1 - 0.05**0.01))),  # the ceiling, 3.49
        (1000, 1000, 1000, 0.0, 5.81),
        (75, 100, 1000, 1e-4, 0.673),  # 2305.08846, appendix D
        (1439, 1510, 100_000, 1e-5, 2.675),  # 2305.08846, section 7
        (50, 100, 200, 1e-5, 0.0),
        (0, 100, 200, 1e-5, 0.0),
    ],
)
def test_bound_gives_known_values(correct: int, guesses: int, canaries: int, delta: float, published: float) -> None:
    assert epsilon_lower_bound(correct, guesses, canaries, delta) == pytest.approx(published, abs=6e-3)


def test_bound_grows_with_correct_guesses_and_shrinks_with_delta_and_canaries() -> None:
    bounds = [epsilon_lower_bound(v, 100, 200, 1e-5) for v in range(101)]
    assert bounds == sorted(bounds)
    assert bounds[57] == 0.0 < bounds[60]
    assert epsilon_lower_bound(90, 100, 200, 1e-3) < epsilon_lower_bound(90, 100, 200, 1e-6)
    assert epsilon_lower_bound(90, 100, 5000, 1e-4) < epsilon_lower_bound(90, 100, 100, 1e-4)


def test_p_value_is_theorem_5_2_by_its_slow_definition() -> None:
    for v, r, m, epsilon, delta in ((9, 10, 12, 0.7, 1e-3), (3, 10, 10, 0.0, 1e-2), (10, 10, 50, 2.0, 1e-4)):
        rate = math.exp(epsilon) / (1 + math.exp(epsilon))

        def tail(least: int, r: int = r, rate: float = rate) -> float:
            return sum(float(binom.pmf(k, r, rate)) for k in range(max(0, least), r + 1))

        worst = max((tail(v - i) - tail(v)) / i for i in range(1, m + 1))
        assert p_value(v, r, m, epsilon, delta) == pytest.approx(min(1.0, tail(v) + 2 * m * delta * worst))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.01)])
def test_bound_holds_for_randomised_response(epsilon: float, delta: float) -> None:
    """Randomised response, which with probability δ tells a bit outright, is (ε, δ)-DP.

    4,000 audits of 100 bits: the bound may exceed ε in 5 % of them; with three standard errors in at most 6.04 %. The
    test wrongly fails with probability below 0.2 %.
    """
    draw = np.random.default_rng(0)
    audits, bits = 4000, 100
    told = draw.random((audits, bits)) < delta
    right = told | (draw.random((audits, bits)) < math.exp(epsilon) / (1 + math.exp(epsilon)))
    counts = right.sum(axis=1)
    bounds = {int(v): epsilon_lower_bound(int(v), bits, bits, delta) for v in np.unique(counts)}
    assert np.mean([bounds[int(v)] > epsilon for v in counts]) <= 0.0604


def test_guesses_are_fixed_before_scores_and_only_their_order_counts() -> None:
    plan = plan_guesses(5, 8)
    assert plan == GuessPlan(guesses_in=3, guesses_out=2)
    included = [False, False, True, True, False, True, True, True]
    scores = np.arange(8.0)
    assert plan.correct(scores, included) == plan.correct(1e9 * scores**3 - 7, included) == 5
    assert plan.correct(-scores, included) == 1
    assert plan.correct(np.zeros(8), included) == 5  # equal scores: by index, which the coins do not depend on


@pytest.mark.parametrize(("guesses", "canaries"), [(1, 10), (11, 10)])
def test_guess_plan_refuses_numbers_that_do_not_fit(guesses: int, canaries: int) -> None:
    with pytest.raises(ConfigError, match="--guesses"):
        plan_guesses(guesses, canaries)
    with pytest.raises(ConfigError, match="expected no more correct"):
        epsilon_lower_bound(guesses + 1, guesses, canaries, 0.0)


def planted(config: RunConfig, count: int = 60) -> tuple[FederatedData, Canaries]:
    data = load_federated_data(config.data, config.seed)
    site = data.sites[0]
    return data, make_canaries(count, config, data.train[site], site, resident_model(config).base.tokenizer)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_canaries_are_rows_of_the_run_and_only_those_that_are_in_are_trained_on(
    make_config: Callable[..., RunConfig], tmp_path: Path, family: str, task: str
) -> None:
    config = make_config(family, task, privacy=PRIVATE | {"sample_rate": None}, data={"max_rows_per_site": 5})
    data, canaries = planted(config)
    audited = audited_config(config, data, canaries.site, 60, tmp_path)
    write_rows(data, canaries, audited, tmp_path)
    read = load_federated_data(audited.data, audited.seed)
    assert read.sites == data.sites
    assert [row.content for row in read.train["site 1"]] == [row.content for row in data.train["site 1"]]
    own = {row.content for row in data.train["site 0"]}
    assert {row.content for row in read.train["site 0"]} - own == {row.content for row in canaries.inserted}
    assert len({row.content for row in canaries.examples}) == 60
    assert audited.privacy.sample_rate == pytest.approx(4 / (5 + 30))
    assert sum(map(len, read.test.values())) == sum(map(len, data.test.values()))


def test_coins_are_fair_and_share_nothing_with_the_canaries(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    first, second = (planted(config.model_copy(update={"seed": seed}), 2000)[1] for seed in (1, 2))
    # Five standard deviations of a binomial of 2,000: wrongly fails in fewer than one of a million.
    assert abs(sum(first.included) - 1000) < 112
    agreement = np.mean(np.array(first.included) == np.array(second.included))
    assert abs(agreement - 0.5) < 0.056
    assert first == planted(config.model_copy(update={"seed": 1}), 2000)[1]


def test_weights_tell_who_was_there_without_noise_and_are_inner_products_with_much() -> None:
    draw = torch.Generator().manual_seed(0)
    alike = torch.randn(300, generator=draw)
    gradients = torch.randn(40, 300, generator=draw) + 3 * alike
    there = (torch.rand(40, generator=draw) < 0.5).double()
    change = gradients.T @ there.float()
    torch.testing.assert_close(_weights(gradients, change), there, atol=0.02, rtol=0)
    noise = 1e5 * torch.randn(300, generator=draw)
    inner = (gradients @ (change + noise)).double()
    weights = _weights(gradients, change + noise)
    assert float(torch.corrcoef(torch.stack([weights, inner]))[0, 1]) > 0.98
    assert not _weights(torch.zeros(3, 5), torch.zeros(5)).any()


def test_membership_of_apart_scores_is_certain_and_of_alike_ones_chance() -> None:
    draw = np.random.default_rng(0)
    apart = measure_membership(1.0 + draw.random(50), draw.random(70), seed=0)
    assert (apart.auc_low, apart.tpr_at_1_percent_fpr) == pytest.approx((1.0, 1.0))
    members, others = draw.random(400), draw.random(300)
    alike = measure_membership(members, others, seed=0)
    assert alike.auc_low < 0.5 < alike.auc_high
    assert alike.auc_low < alike.auc < alike.auc_high
    assert alike == measure_membership(members, others, seed=0)
    few, more = np.array([3.0, 1.0, 1.0]), np.array([2.0, 0.0, 1.0])
    by_hand = np.mean([(m > o) + 0.5 * (m == o) for m in few for o in more])
    assert measure_membership(few, more, seed=0).auc == pytest.approx(by_hand)
    with pytest.raises(DataError, match="0 others"):
        roc(few, np.zeros(0))


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "EXTRAS", {"audit": ("scipy", "no_such_package")})
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install -e '\.\[audit\]'"):
        extra.expect_extra("audit", "the audit")


@pytest.mark.slow
def test_audit_tells_noise_from_none_and_repeats_itself(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = one_site(make_config(**WIDE))
    report = run_audit(config, tmp_path / "audit", QUICK)
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == report
    assert (tmp_path / "audit" / "roc.png").read_bytes().startswith(b"\x89PNG")
    given, quiet = report["runs"]["as given"], report["runs"]["noise off"]
    assert given["claimed_epsilon"] == pytest.approx(1.0, abs=0.02)
    assert quiet["claimed_epsilon"] is None
    assert quiet["white_box"]["epsilon_at_least"] > 1.0 > given["white_box"]["epsilon_at_least"]
    assert quiet["white_box"]["correct"] >= 38
    assert given["membership"]["others"] == 6
    assert report["runs"] == run_audit(config, tmp_path / "again", QUICK)["runs"]
    with pytest.raises(RunError, match="not empty"):
        run_audit(config, tmp_path / "audit", QUICK)


@pytest.mark.slow
def test_bound_exceeds_the_claim_of_a_noisy_run_no_more_often_than_it_may(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 independent audits of ε = 1: each bound may exceed the claim with probability 5 %.

    More than three exceedances of twenty have probability 1.6 % for each of the two attacks, were the claim tight.
    """
    monkeypatch.setattr(audit_module, "draw_roc", lambda *_: None)
    monkeypatch.setattr(audit_module, "_variants", lambda config: {"as given": config})
    config = one_site(make_config(**SMALL, evaluation={"enabled": False}))
    exceeded = {"white_box": 0, "black_box": 0}
    correct = []
    for seed in range(20):
        report = run_audit(config, tmp_path / str(seed), AuditOptions(canaries=60, guesses=60, seed=seed))
        run = report["runs"]["as given"]
        correct.append(run["white_box"]["correct"])
        for attack in exceeded:
            exceeded[attack] += run[attack]["epsilon_at_least"] > run["claimed_epsilon"]
    assert exceeded["white_box"] <= 3
    assert exceeded["black_box"] <= 3
    assert len(set(correct)) > 3  # twenty audits, not one twenty times


@pytest.mark.slow
def test_command_prints_the_table_and_refuses_when_the_noise_is_missing(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(tmp_path, tiny_models["bert"], **WIDE))
    arguments = ["audit", str(path), "--canaries", "40", "--guesses", "40", "--seed", "3", "--out"]
    sound = CliRunner().invoke(simulations.cli.app, [*arguments, str(tmp_path / "sound")])
    assert sound.exit_code == 0, sound.output
    assert "none (∞)" in sound.output
    # The mutant that an audit is for: a run that claims ε = 1 and whose noise is zero. (The self-test would see it.)
    monkeypatch.setattr(client.answers, "self_test", lambda *_: None)
    monkeypatch.setattr(CryptoStream, "normal", lambda self, shape: torch.zeros(tuple(shape), dtype=torch.float64))
    broken = CliRunner().invoke(simulations.cli.app, [*arguments, str(tmp_path / "broken"), "--json"])
    assert broken.exit_code == 1, broken.output
    assert "exceeds the claimed ε 0.99" in broken.stderr
    assert json.loads(broken.stdout)["runs"]["as given"]["white_box"]["correct"] >= 38


def test_audit_of_a_site_level_unit_is_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'site'"):
        run_audit(make_config(privacy={"unit": "site"}), tmp_path / "audit", QUICK)
    assert not (tmp_path / "audit").exists()
