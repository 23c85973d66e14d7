"""Which aggregation methods a run config may ask for, beside what."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.load import parse_run_config
from common.config.method_rules import method_warnings
from common.config.run import RunConfig
from common.config.warnings import config_warnings
from common.errors import ConfigError
from common.factors import A, B, R
from common.methods import METHODS, expect_rank, kept_names, personal_names, received_names, sent_names, trained_names

NAMES = {"x" + A, "x" + B, "head.weight"}
CORED = NAMES | {"x" + R}


def config_of(method: str, **sections: Any) -> RunConfig:
    values = {
        "model": {"source": "some/model"},
        "data": {"task": "classification", "train": "rows.jsonl", "labels": ["a", "b"]},
        "privacy": {"unit": "none"}, "aggregation": {"method": method}, **sections,
    }  # fmt: skip
    import yaml

    return parse_run_config(yaml.safe_dump(values), "run.yaml", None)


def short(names: frozenset[str]) -> str:
    """A, B, R and h for the head, in this order."""
    return "".join(k for k, n in (("A", "x" + A), ("B", "x" + B), ("R", "x" + R), ("h", "head.weight")) if n in names)


TABLE = {
    # method: trained and sent in rounds 1 and 2, received in rounds 1, 2 and 3, kept
    "fedit": ("ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh"),
    "ffa_lora": ("Bh", "Bh", "Bh", "Bh", "Bh", "Bh", "Bh", "Bh"),
    "rolora": ("Bh", "Ah", "Bh", "Ah", "Bh", "Bh", "ABh", "ABh"),
    "fedsa_lora": ("ABh", "ABh", "Ah", "Ah", "Ah", "Ah", "Ah", "Ah"),
    "flora": ("ABh", "ABh", "ABh", "ABh", "h", "h", "h", "h"),
    "flexlora": ("ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh"),
    "hetlora": ("ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh"),
    "fedex_lora": ("ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh"),
    "lora_fair": ("ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh", "ABh"),
    "fedsvd": ("Bh", "Bh", "Bh", "Bh", "Bh", "ABh", "ABh", "ABh"),
    "fed_sb": ("Rh", "Rh", "Rh", "Rh", "Rh", "Rh", "Rh", "Rh"),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_sends_receives_and_keeps_what_the_table_says(method: str) -> None:
    config, names = config_of(method), CORED if METHODS[method].core else NAMES
    got = (
        *(short(trained_names(config, names, number)) for number in (1, 2)),
        *(short(sent_names(config, names, number)) for number in (1, 2)),
        *(short(received_names(config, names, number)) for number in (1, 2, 3)),
        short(kept_names(config, names)),
    )
    assert got == TABLE[method]
    assert short(personal_names(config, names)) == ("B" if method == "fedsa_lora" else "")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["prompt", "head_only"])
def test_only_plain_averaging_goes_without_factors(method: str, kind: str) -> None:
    if method == "fedit":
        assert config_of(method, adapter={"kind": kind}).adapter.kind == kind
        return
    with pytest.raises(ConfigError, match=f"'{method}' needs LoRA factors; expected 'fedit'"):
        config_of(method, adapter={"kind": kind})


@pytest.mark.parametrize("method", METHODS)
def test_site_level_privacy_needs_a_linear_method(method: str) -> None:
    for privacy in ({"unit": "site"}, {"unit": "example", "site_level": {"epsilon": 3.0}}):
        if METHODS[method].linear:
            config_of(method, privacy=privacy)
        else:
            with pytest.raises(ConfigError, match="no sum of updates, so that noise on a sum protects no site"):
                config_of(method, privacy=privacy)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_ranks_need_a_method_for_them(method: str) -> None:
    mixed = {"federation": {"virtual_ranks": [4, 64]}, "adapter": {"rank": 8}}
    if METHODS[method].mixed_ranks:
        config = config_of(method, **mixed)
        assert [expect_rank(config, rank, "north") for rank in (4, 64, None)] == [4, 8, 8]
        return
    with pytest.raises(ConfigError, match=r"needs all sites at one rank.*'flora', 'flexlora', 'hetlora'"):
        config_of(method, **mixed)
    config = config_of(method, federation={"virtual_ranks": [8, 64]})
    assert expect_rank(config, 8, "north") == 8
    with pytest.raises(ConfigError, match="site 'north' holds factors up to rank 4 but the run has 8"):
        expect_rank(config, 4, "north")


def test_fed_sb_needs_weights_to_decompose() -> None:
    with pytest.raises(ConfigError, match="singular vectors of the base weights"):
        config_of("fed_sb", model={"source": "some/model", "quantization": "4bit"})


@pytest.mark.parametrize("method", METHODS)
def test_training_both_factors_under_noise_is_allowed_with_a_warning(method: str) -> None:
    assert method_warnings(config_of(method)) == ()
    warnings = method_warnings(config_of(method, privacy={"unit": "example"}))
    both = TABLE[method][0] == "ABh"
    assert len(warnings) == both
    if METHODS[method].linear:
        assert method_warnings(config_of(method, privacy={"unit": "site", "delta": 1e-3})) == warnings
    assert all("ffa_lora and fedsvd" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("aggregation", "reason"),
    [
        ({"robust": "trimmed_mean", "robust_sites": 0}, "would be the plain mean"),
        ({"robust": "multi_krum", "robust_sites": 0}, "would be the plain mean"),
        ({"robust": "norm_clip", "weights": "examples"}, "can declare 100% of it"),
        ({"robust": "geometric_median", "weights": "examples", "robust_sites": 2}, "can declare 100% of it"),
        (
            {"robust": "geometric_median", "weights": "examples", "robust_sites": 2, "max_weight": 0.25},
            "can declare 50% of it",
        ),
    ],
)
def test_rule_whose_sites_could_be_outvoted_is_refused(aggregation: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_of("fedit", **{"aggregation": aggregation})


@pytest.mark.parametrize(
    "aggregation",
    [
        {"robust": "norm_clip", "robust_sites": 0, "weights": "examples"},
        {"robust": "geometric_median", "weights": "examples", "robust_sites": 2, "max_weight": 0.2},
        {"robust": "multi_krum", "weights": "examples"},
        {"robust": "geometric_median", "robust_sites": 9},
    ],
)
def test_rule_whose_sites_outvote_the_bad_ones_is_taken(aggregation: dict[str, Any]) -> None:
    assert config_of("fedit", **{"aggregation": aggregation}).aggregation.robust == aggregation["robust"]


def test_settings_without_effect_are_told() -> None:
    unused = {"server_lr": 0.01, "server_tau": 1.0, "residual_penalty": 0.5}
    found = config_warnings(config_of("fedit", **{"aggregation": unused}))
    assert [sentence.split()[0].partition(".")[2] for sentence in found] == list(unused)
    used = {**unused, "server_optimizer": "fedadam"}
    (wild,) = config_warnings(config_of("fedit", **{"aggregation": {"server_optimizer": "fedyogi"}}))
    assert "Begin with 0.01" in wild
    for rule in ("median", "krum"):
        (ignored,) = config_warnings(config_of("fedit", **{"aggregation": {"robust": rule, "weights": "examples"}}))
        assert "aggregation.weights has no effect" in ignored
    assert len(config_warnings(config_of("fedit", **{"aggregation": used}))) == 1
    momentum = {"server_optimizer": "fedavgm", "server_beta1": 0.5, "server_beta2": 0.5, "server_tau": 1.0}
    assert len(config_warnings(config_of("fedit", **{"aggregation": momentum}))) == 2
    fair = {"method": "lora_fair", "residual_penalty": 1.0}
    assert config_warnings(config_of("lora_fair", **{"aggregation": fair})) == ()
    (alone,) = config_warnings(config_of("rolora", federation={"rounds": 1}))
    assert "A stays as it is" in alone


@pytest.mark.parametrize(
    ("section", "unused", "used"),
    [
        ("aggregation", {"robust_sites": 2}, {"robust": "median"}),
        ("federation", {"max_staleness": 3, "staleness_exponent": 1.0}, {"late": "carry"}),
        ("federation", {"extension_s": 5.0}, {"below_min": "extend"}),
        ("communication", {"block": 32}, {"codec": "int8"}),
        ("communication", {"block": 32}, {"down": "int4"}),
        ("adapter", {"virtual_tokens": 4}, {"kind": "prompt"}),
        ("privacy", {"unit": "none", "epsilon": 3.0, "delta": 1e-6, "clip_norm": 0.5}, {"unit": "example"}),
        ("privacy", {"unit": "example", "clip_lr": 0.3, "quantile_share": 0.1}, {"clipping": "adaptive"}),
        ("privacy", {"unit": "example", "loss_bound": 2.0}, {"release_loss": True}),
    ],
)
def test_each_setting_without_effect_is_named_with_what_it_needs(
    section: str, unused: dict[str, Any], used: dict[str, Any]
) -> None:
    found = [one for one in config_warnings(config_of("fedit", **{section: unused})) if "no effect" in one]
    assert sorted(one.split()[0] for one in found) == sorted(f"{section}.{key}" for key in unused if key != "unit")
    both = config_warnings(config_of("fedit", **{section: {**unused, **used}}))
    assert not any("no effect" in one for one in both)


def test_rule_whose_weights_the_method_undoes_is_refused() -> None:
    with pytest.raises(ConfigError, match="weighs sites by their norm, which gives it back"):
        config_of("hetlora", **{"aggregation": {"method": "hetlora", "robust": "geometric_median"}})
    config_of("hetlora", **{"aggregation": {"method": "hetlora", "robust": "multi_krum"}})
