from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.load import dump_run_config, load_run_config, parse_run_config
from common.config.run import RunConfig
from common.config.yaml_text import parse_value, parse_yaml
from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
model: {source: some/model}
data:
  task: classification
  train: rows.jsonl
  labels: [a, b]
"""


def parse(text: str, *overrides: str) -> RunConfig:
    return parse_run_config(text, "run.yaml", Path("/base"), overrides)


def test_minimal_config_has_safe_privacy_defaults() -> None:
    config = parse(BASE)
    assert config.privacy.unit == "example"
    assert config.privacy.target_epsilon == 8.0
    assert config.aggregation.weights == "uniform"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "1.e-5", "+1e-5"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert parse(BASE + f"training: {{lr: {text}}}").training.lr == 1e-5


def test_paths_are_relative_to_the_file_and_overrides_to_the_current_folder() -> None:
    assert parse(BASE).data.train == "/base/rows.jsonl"
    assert parse(BASE, "data.train=other.csv").data.train == str(Path.cwd() / "other.csv")
    assert parse(BASE, "data.train=package:common/x.csv").data.train == "package:common/x.csv"


def test_dump_reads_back_to_the_same_config() -> None:
    config = parse(BASE + "training: {lr: 3e-7}\nseed: 5")
    again = parse_run_config(dump_run_config(config), "again", None)
    assert again == config
    assert again.digest() == config.digest()
    assert again.digest() != parse(BASE).digest()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    load_run_config(path)
    assert path.read_text().startswith(f"# fedtune-sim run configs/{path.name}")


BAD = {
    "unknown key": ("training: {optimiser: sgd}", "line 6", "did you mean 'optimizer'"),
    "known by another name": ("training: {learning_rate: 1}", "line 6", "did you mean 'lr'"),
    "misspelt section": ("trainig: {}", "line 6", "did you mean 'training'"),
    "wrong type": ("training: {lr: fast}", "line 6", "training.lr is 'fast'"),
    "number as text": ("federation: {rounds: '3'}", "line 6", "federation.rounds"),
    "boolean as number": ("federation: {rounds: true}", "line 6", "federation.rounds"),
    "not a number": ("training: {lr: .nan}", "line 6", "finite"),
    "infinity": ("training: {lr: .inf}", "line 6", "finite"),
    "negative rounds": ("federation: {rounds: -2}", "line 6", "greater than or equal to 1"),
    "duplicate key": ("training: {lr: 1}\ntraining: {lr: 2}", "line 7", "twice"),
    "duplicate inner key": ("training:\n  lr: 1\n  lr: 2", "line 8", "twice"),
    "tab": ("training:\n\tlr: 1", "line 7", "Indent with spaces"),
    "scalar as section": ("training: 7", "line 6", "section"),
    "unknown choice": ("aggregation: {method: magic}", "line 6", "'fedit', 'ffa_lora',"),
    "two lengths": ("training: {local_epochs: 1, local_steps: 2}", "line 6", "one of them"),
    "two privacy targets": ("privacy: {epsilon: 1, noise_multiplier: 1}", "line 6", "one of them"),
    "weights leak counts": ("aggregation: {weights: examples}", "run.yaml", "uniform"),
    "clip twice": ("training: {max_grad_norm: 1}", "run.yaml", "clip_norm"),
    "too few sampled": ("federation: {sites_per_round: 1, min_sites: 2}", "run.yaml", "min_sites"),
    "bad name": ("name: ../up", "line 6", "name"),
    "unclosed": ("training: {lr: 1", "line", "expected YAML"),
    "anchor loop": ("training: &a {x: *a}", "run.yaml", "expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config_names_place_rule_and_remedy(case: str) -> None:
    text, place, rule = BAD[case]
    with pytest.raises(ConfigError) as caught:
        parse(BASE + text)
    message = str(caught.value)
    assert message.startswith("run.yaml")
    assert place in message
    assert rule in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("training", "section.key=value"),
        ("training.lr=-1", "greater than 0"),
        ("training.nope=1", "unknown key"),
        ("seed.x=1", "valid integer"),
        ("data.train.x=1", "no section"),
    ],
)
def test_bad_override_names_itself(override: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        parse(BASE, override)
    assert str(caught.value).startswith("--set")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n- 2\n", "just text"])
def test_text_without_sections_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_yaml(text, "run.yaml")


def test_missing_file_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path, rule in (("no.yaml", "does not exist"), ("", "folder"), ("latin.yaml", "UTF-8")):
        with pytest.raises(ConfigError, match=rule):
            load_run_config(tmp_path / path)


def test_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_run_config(path).data.labels == ("a", "b")


def test_hub_source_needs_a_pinned_revision() -> None:
    hub = BASE.replace("some/model", "hub:owner/name")
    with pytest.raises(ConfigError, match="revision is missing"):
        parse(hub)
    with pytest.raises(ConfigError, match="remove it"):
        parse(BASE, "model.revision=" + "a" * 40)
    assert parse(hub, "model.revision=" + "a" * 40).model.revision == "a" * 40


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_survives_an_override(value: float) -> None:
    assert parse_value(repr(value)) == value


def test_schema_lists_every_section(make_config: Callable[..., RunConfig]) -> None:
    schema = RunConfig.model_json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False


def test_misspelt_key_is_named_before_what_is_missing_for_it() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data\.taskk'; did you mean 'task'"):
        parse_run_config("model: {source: m}\ndata: {taskk: classification, train: t, labels: [a, b]}\n", "test", None)


BAD_SIMULATIONS = {
    "shares": ("profiles: [{name: a, share: 0.5}]", "add up to 0.5; expected 1"),
    "profile of nobody": ("profiles: [{name: a}]", "expected one of the two"),
    "two speeds": ("profiles: [{name: a, share: 1, step_s: 1, tokens_per_s: 1}]", "expected one of them"),
    "profile twice": ("profiles: [{name: a, share: 0.5}, {name: a, share: 0.5}]", "a name twice"),
    "site twice": ("profiles: [{name: a, sites: [x]}, {name: b, sites: [x]}]", "a site twice"),
    "empty window": ("windows: [{site: x, from_round: 3, to_round: 2}]", "to_round 2 is before from_round 3"),
    "unknown attack": ("attacks: [{name: magic, share: 1}]", "'sign_flip'"),
    "attack of nobody": ("attacks: [{name: nan}]", "expected one of the two"),
    "attack backwards": ("attacks: [{name: nan, share: 1, from_round: 2, to_round: 1}]", "before from_round"),
    "probability": ("dropout: 1.5", "less than or equal to 1"),
}


@pytest.mark.parametrize("case", BAD_SIMULATIONS)
def test_bad_simulation_section_is_refused_with_its_line(case: str) -> None:
    text, rule = BAD_SIMULATIONS[case]
    with pytest.raises(ConfigError, match=r"run\.yaml line 6") as caught:
        parse(BASE + f"simulation: {{{text}}}")
    assert rule in str(caught.value)


def test_simulation_section_is_part_of_the_digest_and_its_absence_is_not() -> None:
    plain, faulty = parse(BASE), parse(BASE + "simulation: {dropout: 0.1}")
    assert "simulation" not in dump_run_config(plain)
    assert plain.digest() != faulty.digest()
    assert parse_run_config(dump_run_config(faulty), "again", None) == faulty
    hash(faulty)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("adapter.target_modules=foo", "expected 'auto' or 'all-linear' or a list. Correct"),
        ("adapter.target_modules=[]", "expected 'auto' or 'all-linear' or one with at least 1 item. Correct"),
        ("adapter.target_modules=[query, 5]", "expected 'auto' or 'all-linear' or a valid string at 1. Correct"),
        ("federation.virtual_ranks=4", "federation.virtual_ranks is 4; expected a list. Correct"),
        ("federation.rounds=0", "expected greater than or equal to 1. Correct"),
        ("name=_a b", "expected one of the pattern"),
    ],
)
def test_error_tells_each_form_that_a_value_may_have(override: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(ROOT / "configs" / "quickstart.yaml", [override])
    assert rule in str(caught.value)
