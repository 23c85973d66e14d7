"""``fedtune-client plan`` and ``ledger``, as an engineer at a site types them; and the site config behind them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from client.cli import app
from client.ledger.events import Charge
from client.ledger.ledger import Ledger
from client.plan import plan_run
from client.site import read_site_rows
from client.site_config import SiteConfig, load_site_config
from common.config.load import load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from tests.client.ledgers import OTHER_RUN, RUN, charge, new_ledger, request
from tests.conftest import LABELS, config_text, label_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


@pytest.fixture
def site(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    """A folder with run.yaml, site.yaml and the site's 24 rows."""
    run = config_text(tmp_path, tiny_models["bert"], privacy=PRIVATE, federation={"rounds": 12})
    (tmp_path / "run.yaml").write_text(run)
    write_rows(tmp_path / "own.jsonl", label_rows(24))
    write_site(tmp_path)
    new_ledger(tmp_path / "ledger.db")
    return tmp_path


def write_site(folder: Path, **changes: Any) -> Path:
    values = {
        "name": "north", "data": "own.jsonl", "ledger": "ledger.db", "model": "base", "budget": {"epsilon": 12.0},
        "rows": {"task": "classification", "labels": LABELS},
    } | changes  # fmt: skip
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def spend(folder: Path, rounds: int, round_charge: Charge, run: str = OTHER_RUN, last_commits: bool = True) -> Ledger:
    rows = read_site_rows(load_run_config(folder / "run.yaml"), load_site_config(folder / "site.yaml"))
    ledger = rows.ledger.ledger
    for number in range(1, rounds + 1):
        ledger.reserve(request(number, run), rows.ledger.dataset, round_charge, rows.ledger.budget)
        if number < rounds or last_commits:
            ledger.commit(request(number, run), b"update")
    return ledger


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_plan_tells_what_is_spent_and_left_at_this_site(site: Path) -> None:
    empty = json.loads(call("plan", site / "run.yaml", "--site", site / "site.yaml", "--json")[1])
    assert [row["rounds"] for row in empty["epsilon_after"]] == [1, 2, 5, 10, 12]
    assert [row["steps"] for row in empty["epsilon_after"]] == [6, 12, 30, 60, 72]
    assert (empty["units_at_site"], empty["sample_rate"], empty["noise_multiplier"]) == (24, 4 / 24, 1.0)
    assert empty["budget"]["epsilon_spent"] == 0
    spend(site, 2, charge(6, 1.0, 4 / 24))
    later = json.loads(call("plan", site / "run.yaml", "--site", site / "site.yaml", "--json")[1])
    assert later["budget"]["steps_left"] == empty["budget"]["steps_left"] - 12
    assert later["budget"]["rounds_left"] == later["budget"]["steps_left"] // 6
    assert later["epsilon_after"][0]["epsilon_with_ledger"] > later["epsilon_after"][0]["epsilon"]
    assert later["epsilon_after"][0]["epsilon"] == empty["epsilon_after"][0]["epsilon"]


@pytest.mark.slow
def test_plan_goes_from_epsilon_to_noise_and_back(make_config: Callable[..., RunConfig]) -> None:
    plan = plan_run(make_config(privacy=PRIVATE), 24)
    noises = [row["noise_multiplier"] for row in plan["noise_for"]]
    assert noises == sorted(noises, reverse=True)
    for row in plan["noise_for"]:
        back = plan_run(make_config(privacy=PRIVATE | {"noise_multiplier": row["noise_multiplier"]}), 24)
        assert row["epsilon"] - 0.02 <= back["epsilon_after"][-1]["epsilon"] <= row["epsilon"]


def test_plan_is_shown_as_tables_with_advice(site: Path) -> None:
    status, shown, _ = call("plan", site / "run.yaml", "--site", site / "site.yaml")
    assert status == 0
    for words in ("24 records", "ε with the ledger", "noise multiplier", "Budget ε 12", "whole rounds", "Advice: "):
        assert words in shown
    status, shown, _ = call("plan", site / "run.yaml", "--rows", 5000)
    assert status == 0
    assert "5000 records" in shown
    assert "ledger" not in shown


def test_plan_of_a_run_that_the_site_cannot_hold_is_refused(site: Path) -> None:
    write_site(site, max_rank=1)
    status, _, error = call("plan", site / "run.yaml", "--site", site / "site.yaml")
    assert status == 2
    assert "holds factors up to rank 1 but the run has 2" in error


def test_plan_with_a_delta_of_one_record_in_all_is_refused(site: Path) -> None:
    write_site(site, budget={"epsilon": 12.0, "delta": 1 / 24})
    status, _, error = call("plan", site / "run.yaml", "--site", site / "site.yaml")
    assert status == 1
    assert "budget.delta is 0.0416667 at a site of 24 records; expected well below 0.0417" in error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "expected either --site"),
        (["--rows", "5", "--site", "x.yaml"], "expected either --site"),
        (["--site", "nowhere.yaml"], "does not exist; expected a site config"),
    ],
)
def test_plan_without_one_site_is_refused(site: Path, arguments: list[str], line: str) -> None:
    status, _, error = call("plan", site / "run.yaml", *arguments)
    assert status == 2
    assert line in error


def test_plan_of_a_run_without_noise_at_sites_is_refused(site: Path) -> None:
    changed = (
        (site / "run.yaml").read_text().replace("unit: example", "unit: none").replace("noise_multiplier: 1.0", "")
    )
    (site / "run.yaml").write_text(changed)
    status, _, error = call("plan", site / "run.yaml", "--rows", 50)
    assert status == 2
    assert "add no noise" in error


@pytest.mark.slow
def test_ledger_shows_datasets_runs_and_what_is_left(site: Path) -> None:
    ledger = spend(site, 3, charge(6, 1.0, 0.1), last_commits=False)
    before = ledger.path.read_bytes()
    status, text, _ = call("ledger", site / "site.yaml", "--json")
    assert status == 0
    report = json.loads(text)
    (rows,), (run,) = report["datasets"], report["runs"]
    assert (rows["rows"], rows["rounds_charged"]) == (24, 3)
    assert rows["epsilon_spent"] + rows["epsilon_left"] == pytest.approx(12.0)
    assert rows["epsilon_spent"] == run["epsilon_alone"]
    assert rows["rounds_left_like_the_last"] == rows["steps_left_like_the_last"] // 6
    assert (run["rounds"], run["without_release"], run["steps"]) == ([1, 2, 3], [3], 18)
    assert report["head"] == ledger.verify()[1]
    status, shown, _ = call("ledger", site / "site.yaml")
    for words in ("budget ε 12", "1-3", "chain unbroken", report["head"], OTHER_RUN[:12]):
        assert words in shown
    assert ledger.path.read_bytes() == before


def test_ledger_file_alone_is_shown_without_a_budget(site: Path) -> None:
    spend(site, 1, charge(6))
    status, text, _ = call("ledger", site / "ledger.db", "--json")
    assert status == 0
    assert json.loads(text)["budget"] == {"epsilon": None, "delta": 1e-5, "unit": "example"}
    assert "epsilon_left" not in json.loads(text)["datasets"][0]


def test_charge_that_the_budget_cannot_count_is_shown_as_unknown(site: Path) -> None:
    spend(site, 1, charge(6))
    rows = [row | {"patient": "p"} for row in label_rows(24)]
    write_rows(site / "own.jsonl", rows)
    write_site(site, person_field="patient", budget={"epsilon": 5.0, "unit": "user"})
    status, text, _ = call("ledger", site / "site.yaml", "--json")
    assert status == 0
    assert json.loads(text)["datasets"][0]["epsilon_left"] is None


def test_status_says_unknown_where_one_dataset_of_several_cannot_be_counted(site: Path) -> None:
    spend(site, 1, charge(6))
    write_rows(site / "own.jsonl", [row | {"patient": "p"} for row in label_rows(24, start=24)])
    write_site(site, person_field="patient")
    assert len(spend(site, 1, charge(1, unit="user"), run=RUN).history().datasets) == 2
    counted = json.loads(call("status", site / "site.yaml", "--json")[1])
    assert counted["epsilon_spent"] > 0
    write_site(site, person_field="patient", budget={"epsilon": 5.0, "unit": "user"})
    status, text, error = call("status", site / "site.yaml", "--json")
    assert (status, error) == (1, "")  # the agent does not run
    assert json.loads(text)["epsilon_spent"] is None
    assert "ε unknown of 5 spent" in call("status", site / "site.yaml")[1]


def test_status_reads_the_spend_and_not_the_bytes_that_were_released(site: Path) -> None:
    path = spend(site, 1, charge(6)).path
    spent = json.loads(call("ledger", site / "site.yaml", "--json")[1])["datasets"][0]["epsilon_spent"]
    assert spent > 0
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE payloads SET payload = x'00'")
        connection.commit()
    assert call("ledger", site / "site.yaml")[0] == 1
    assert json.loads(call("status", site / "site.yaml", "--json")[1])["epsilon_spent"] == spent


def test_broken_chain_is_one_line_and_a_failing_status(site: Path) -> None:
    ledger = spend(site, 2, charge(6))
    with closing(sqlite3.connect(ledger.path)) as connection:
        connection.execute("DROP TRIGGER events_no_update")
        connection.execute("UPDATE events SET body = replace(body, '\"steps\":6', '\"steps\":1') WHERE seq = 5")
        connection.commit()
    for source in ("site.yaml", "ledger.db"):
        status, shown, error = call("ledger", site / source)
        assert (status, shown) == (1, "")
        assert "event 5 does not follow" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("ledger", "site.yaml"), ("ledger", "ledger.db"), ("plan", "run.yaml", "--site", "site.yaml")]
)
def test_ledger_that_is_not_there_is_one_line_and_not_made(site: Path, arguments: tuple[str, ...]) -> None:
    (site / "ledger.db").unlink()
    status, _, error = call(*(site / part if part.endswith((".yaml", ".db")) else part for part in arguments))
    assert status == 1
    assert "does not exist" in error
    assert error.count("\n") == 1
    assert not (site / "ledger.db").exists()


def test_new_ledger_is_made_once_and_says_what_it_means(site: Path) -> None:
    (site / "ledger.db").unlink()
    status, shown, _ = call("new-ledger", site / "site.yaml")
    assert status == 0
    assert shown.count("\n") == 1
    assert "nothing was spent" in shown
    content = (site / "ledger.db").read_bytes()
    status, shown, error = call("new-ledger", site / "site.yaml")
    assert (status, shown) == (1, "")
    assert "exists; expected a place that holds nothing" in error
    assert (site / "ledger.db").read_bytes() == content
    assert json.loads(call("ledger", site / "site.yaml", "--json")[1])["datasets"] == []


def test_site_config_is_read_with_paths_beside_it(site: Path) -> None:
    config = load_site_config(write_site(site))
    assert (config.data, config.ledger) == (str(site / "own.jsonl"), str(site / "ledger.db"))
    assert config.model == str(site / "base")
    assert load_site_config(write_site(site, model="package:some/base")).model == "package:some/base"
    assert (config.rows.text_field, config.rows.label_field, config.rows.labels) == ("text", "label", tuple(LABELS))
    assert (config.budget.delta, config.budget.unit, config.device) == (1e-5, "example", "auto")


def test_site_config_of_the_guide_can_be_read(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "site.md").read_text(encoding="utf-8")
    (tmp_path / "site.yaml").write_text(guide.split("```yaml\n")[1].split("```")[0])
    config = load_site_config(tmp_path / "site.yaml")
    assert (config.name, config.rows.labels, config.person_field) == ("north-clinic", ("heart", "skin"), "patient")
    assert config.model_fields_set == set(SiteConfig.model_fields)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"budget": None}, "budget is missing"),
        ({"budget": {"epsilon": 0}}, "budget.epsilon is 0"),
        ({"budget": {"epsilon": 1.0, "unit": "site"}}, "budget.unit is 'site'"),
        ({"budget": {"epsilon": 1.0, "unit": "user"}}, "person_field is missing"),
        ({"bugdet": 1}, "did you mean 'budget'"),
        ({"data": "hub:owner/name"}, "data is a hub id"),
        ({"model": "hub:owner/name"}, "model is a hub id"),
        ({"model": None}, "model is missing"),
        ({"rows": None}, "rows is missing"),
        ({"rows": {"task": "classification"}}, "labels is missing"),
        ({"rows": {"task": "causal_lm", "labels": ["a", "b"]}}, "labels is set"),
        ({"rows": {"task": "classification", "labels": ["1", 1]}}, "labels has a label twice"),
        ({"name": "a\nb"}, "name"),
    ],
)
def test_wrong_site_config_is_one_line_that_names_the_key(site: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        load_site_config(write_site(site, **changes))
    assert "\n" not in str(caught.value)


def test_key_that_stands_twice_is_refused(site: Path) -> None:
    path = write_site(site)
    path.write_text(path.read_text() + "ledger: other.db\n")
    with pytest.raises(ConfigError, match="'ledger' stands twice"):
        load_site_config(path)
