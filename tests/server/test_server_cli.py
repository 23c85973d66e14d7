"""``fedtune-server`` as it is typed: what it prints, and that a mistake is one line and a status that is not zero."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from common.config.load import dump_run_config
from common.kit import Kit
from server.cli import app
from server.run_place import RunPlace
from server.state_folder import StateFolder
from tests.server.coordinator import free_port, site_key
from tests.server.run_configs import run_config


class Coordinator:
    """Commands on a state folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "c"

    def __call__(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--state", str(self.state)])

    def says(self, *arguments: str | Path) -> str:
        result = self(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def values(self, *arguments: str | Path) -> Any:
        return json.loads(self.says(*arguments, "--json"))

    def refuses(self, *arguments: str | Path) -> str:
        result = self(*arguments)
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output
        error = result.stderr.strip()
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        return error


@pytest.fixture
def made() -> Iterator[Coordinator]:
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        coordinator = Coordinator(Path(name))
        ports = ("--superlink-port", str(free_port()))
        coordinator.says("init", "--federation", "clinics", "--address", f"127.0.0.1:{free_port()}", *ports)
        yield coordinator


@pytest.fixture
def asked(made: Coordinator) -> Coordinator:
    config = made.folder / "run.yaml"
    config.write_text(dump_run_config(run_config()))
    assert made.values("run", config)["state"] == "waiting"
    return made


def test_site_is_enrolled_gets_its_kit_and_is_revoked(made: Coordinator) -> None:
    key = made.folder / "site.pub"
    key.write_text(site_key()[1])
    assert made.values("sites", "add", "north", key)["state"] == "waits for the coordinator"
    made.says("sites", "kit", "north", "--out", made.folder / "kit.yaml")
    kit = Kit.read(made.folder / "kit.yaml")
    kit.verify()
    assert kit.site == "north"
    assert [site["name"] for site in made.values("sites", "list")] == ["north"]
    assert made.values("sites", "revoke", "north")["state"] == "revoked"
    assert "no site 'north'" in made.refuses("sites", "kit", "north")


def test_fingerprint_is_the_same_at_init_and_in_every_kit(made: Coordinator) -> None:
    key = made.folder / "site.pub"
    key.write_text(site_key()[1])
    made.says("sites", "add", "north", key)
    said = made.says("sites", "kit", "north", "--out", made.folder / "kit.yaml")
    assert Kit.read(made.folder / "kit.yaml").fingerprint() in said


def test_mistakes_are_one_line_each(made: Coordinator) -> None:
    assert "not empty" in made.refuses("init", "--federation", "x", "--address", "a.example.org:1")
    assert "cannot be read" in made.refuses("sites", "add", "north", made.folder / "absent.pub")
    for command in ("watch", "pause", "resume", "stop", "rounds", "status", "logs"):
        assert "no run 'absent'" in made.refuses(command, "absent")
    assert "does not exist" in made.refuses("run", made.folder / "absent.yaml")
    assert "no run 'absent'" in made.refuses("set", "absent", "sites_per_round=1")


def test_folder_that_is_no_state_folder_is_refused(tmp_path: Path) -> None:
    stranger = Coordinator(tmp_path)
    for command in (["sites", "list"], ["runs"], ["status"], ["down"], ["up"]):
        assert "no state folder" in stranger.refuses(*command)


def test_run_waits_for_the_coordinator_and_is_listed(asked: Coordinator) -> None:
    (line,) = asked.values("runs")
    assert (line["run"], line["state"], line["live"], line["completed_rounds"]) == ("tiny", "waiting", False, 0)
    view = asked.values("status", "tiny")
    assert (view["phase"], view["rounds"], view["sites"]) == ("waiting", 3, [])
    assert asked.values("rounds", "tiny") == []
    assert "tiny" in asked.says("runs")
    assert "is there already" in asked.refuses("run", asked.folder / "run.yaml")


def test_run_that_nobody_works_on_cannot_be_steered_but_given_up(asked: Coordinator) -> None:
    for command in (["pause", "tiny"], ["resume", "tiny"], ["set", "tiny", "sites_per_round=2"]):
        assert "no ServerApp works" in asked.refuses(*command)
    assert "no assignment" in asked.refuses("set", "tiny", "sites_per_round")
    asked.says("stop", "tiny")
    assert RunPlace(StateFolder(asked.state), "tiny").stop_wish.exists()


def test_run_without_an_adapter_cannot_be_exported(asked: Coordinator) -> None:
    assert "has no adapter yet" in asked.refuses("export", "tiny", "--to", asked.folder / "out")
    assert not (asked.folder / "out").exists()


def test_status_says_that_nothing_runs(made: Coordinator) -> None:
    known = made.values("status")
    assert not known["up"]
    assert not any(known["answers"].values())
    assert known["certificate_days_left"] > 390
    assert "was not up" in made.says("down")


def test_complete_rounds_are_read_from_the_run_folder(asked: Coordinator) -> None:
    place = RunPlace(StateFolder(asked.state), "tiny")
    place.folder.checkpoint.mkdir(parents=True)
    (place.folder.checkpoint / "state.json").write_text('{"round": 1}')
    site = {"status": "admitted", "reason": None, "bytes_up": 7, "bytes_down": 5, "mechanism": None}
    place.folder.log({"kind": "start", "sites": ["a", "b"], "left_out": {"7": "a site refused to take part"}})
    place.folder.log({"kind": "round", "round": 1, "sites": {"a": site}, "seconds": {"total": 2.0}})
    place.folder.log({"kind": "evaluation", "round": 1, "metrics": {"overall": {"loss": 0.5}}})
    (record,) = asked.values("rounds", "tiny")
    assert record["metrics"] == {"loss": 0.5}
    view = asked.values("status", "tiny")
    assert (view["completed_rounds"], view["bytes_up"], view["metrics"]) == (1, 7, {"loss": 0.5})
    assert [(one["site"], one["status"]) for one in view["sites"]] == [("a", "admitted"), ("b", "idle")]
    assert view["left_out"] == ["a site refused to take part"]
    assert "left out: a site refused" in asked.says("status", "tiny")
    assert "admitted" in asked.says("rounds", "tiny")
