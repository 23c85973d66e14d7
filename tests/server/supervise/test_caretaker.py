"""The caretaker with a SuperLink that dies at the worst moments: a run is worked on by one ServerApp, the newest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from common.errors import ConfigError, RunError
from server.cli import app
from server.enrolment import Enrolment
from server.run_place import Outcome, RunPlace, ask_for_run, find_run, known_runs
from server.state_folder import StateFolder
from server.supervise.caretaker import Caretaker
from server.supervise.decision import MOST_FRUITLESS
from tests.server.coordinator import coordinator, site_key
from tests.server.run_configs import run_config
from tests.server.supervise.link import Clock, Link, kill, serverapp


@pytest.fixture
def state() -> Iterator[StateFolder]:
    with coordinator() as made:
        yield made


@pytest.fixture
def place(state: StateFolder) -> RunPlace:
    return ask_for_run(state, run_config())


def test_run_is_submitted_once_while_its_serverapp_starts_and_lives(state: StateFolder, place: RunPlace) -> None:
    link, clock = Link(), Clock()
    caretaker = Caretaker(state, link, clock=clock)
    for _ in range(3):
        caretaker.look()
    process = serverapp(state, 1)
    try:
        link.statuses[1] = "finished:failed"  # the SuperLink was killed; the ServerApp survives that
        clock.now_s += 1e6
        caretaker.look()
    finally:
        kill(process)
    assert len(link.carried) == 1
    assert place.submission().state == "submitted"


def test_run_whose_serverapp_was_killed_is_stopped_and_submitted_with_a_newer_fence(
    state: StateFolder, place: RunPlace
) -> None:
    link, clock = Link(), Clock()
    caretaker = Caretaker(state, link, clock=clock)
    caretaker.look()
    process = serverapp(state, 1)
    kill(process)
    link.statuses[1] = "running"
    for _ in range(3):
        caretaker.look()
        clock.now_s += 100
    assert link.statuses[1] == "finished:stopped"
    assert [values["run-fence"] for values in link.carried] == [1, 2]
    assert {values["run-name"] for values in link.carried} == {"tiny"}


def dead_while_flower_has_it_as_running(state: StateFolder, link: Link, clock: Clock) -> Caretaker:
    caretaker = Caretaker(state, link, clock=clock)
    caretaker.look()
    kill(serverapp(state, 1))
    link.statuses[1] = "running"
    return caretaker


@pytest.mark.parametrize("how", [KeyboardInterrupt(), RunError("flwr stop did not answer; expected the SuperLink.")])
def test_run_goes_on_though_the_caretaker_or_the_answer_is_lost_once_it_was_stopped(
    state: StateFolder, place: RunPlace, how: BaseException
) -> None:
    link, clock = Link(), Clock()
    caretaker = dead_while_flower_has_it_as_running(state, link, clock)
    link.stop_fails, link.loses_stop = how, True
    with contextlib.suppress(KeyboardInterrupt):
        caretaker.look()
    assert link.statuses[1] == "finished:stopped"
    link.stop_fails = None
    for _ in range(3):
        Caretaker(state, link, clock=clock).look()
        clock.now_s += 100
    assert (place.submission().state, place.submission().fruitless) == ("submitted", 1)
    assert [values["run-fence"] for values in link.carried] == [1, 2]
    link.statuses[2] = "finished:stopped"  # this one an operator has stopped
    caretaker.look()
    assert place.submission().state == "stopped"


def test_stop_that_fails_is_tried_again_and_keeps_no_other_run_waiting(state: StateFolder, place: RunPlace) -> None:
    link, clock = Link(), Clock()
    caretaker = dead_while_flower_has_it_as_running(state, link, clock)
    other = ask_for_run(state, run_config(name="zeta"))
    link.stop_fails = RunError("flwr stop failed; expected success.")
    caretaker.look()
    assert (link.statuses[1], other.submission().state) == ("running", "submitted")
    link.stop_fails = None
    for _ in range(3):
        caretaker.look()
        clock.now_s += 100
    assert link.statuses[1] == "finished:stopped"
    assert place.submission().fence == 2


def test_serverapp_of_an_older_submission_ends_before_it_does_anything(state: StateFolder, place: RunPlace) -> None:
    link = Link()
    Caretaker(state, link).look()
    place.write(place.submission().model_copy(update={"state": "submitting"}))  # died while it submitted
    Caretaker(state, link).look()
    assert place.submission().fence == 2
    with pytest.raises(RunError, match="replaced by 2"), place.lease(1, 0.0):
        pytest.fail("an old ServerApp got the lease")
    with place.lease(2, 0.0):
        assert place.is_live()
    assert not place.is_live()


def test_two_serverapps_never_hold_the_lease(state: StateFolder, place: RunPlace) -> None:
    Caretaker(state, Link()).look()
    process = serverapp(state, 1)
    try:
        assert place.is_live()
        with pytest.raises(RunError, match="another ServerApp"), place.lease(1, 0.0):
            pytest.fail("two held it")
    finally:
        kill(process)
    assert not place.is_live()


def test_run_that_never_completes_a_round_fails_in_the_end_and_says_why(state: StateFolder, place: RunPlace) -> None:
    link, clock = Link(), Clock()
    caretaker = Caretaker(state, link, clock=clock)
    for _ in range(4 * MOST_FRUITLESS):
        caretaker.look()
        fence = place.submission().fence
        place.write_outcome(Outcome(fence=fence, ended="failed", reason="0 sites came", final=False))
        link.statuses[len(link.carried)] = "finished:failed"
        clock.now_s += 100
    assert (place.submission().state, place.submission().reason) == ("failed", "0 sites came")
    assert len(link.carried) == MOST_FRUITLESS


def test_run_that_completes_a_round_each_time_goes_on(state: StateFolder, place: RunPlace) -> None:
    link, clock = Link(), Clock()
    caretaker = Caretaker(state, link, clock=clock)
    place.folder.checkpoint.mkdir(parents=True)
    for number in range(2 * MOST_FRUITLESS):
        caretaker.look()
        link.statuses[len(link.carried)] = "finished:failed"
        (place.folder.checkpoint / "state.json").write_text(json.dumps({"round": number + 1}))
    assert len(link.carried) == 2 * MOST_FRUITLESS
    assert place.submission().fruitless == 0


def test_superlink_that_refuses_runs_is_asked_ever_less_often(state: StateFolder, place: RunPlace) -> None:
    link, clock = Link(), Clock()
    caretaker, link.refuses_runs = Caretaker(state, link, clock=clock), True
    with pytest.raises(RunError):
        caretaker.look()
    caretaker.look()  # not due yet
    assert place.submission().fruitless == 1
    link.refuses_runs = False
    clock.now_s += 100
    caretaker.look()
    assert place.submission().state == "submitted"


def test_run_stopped_while_nobody_works_on_it_is_over(state: StateFolder, place: RunPlace) -> None:
    place.stop_wish.touch()
    link = Link()
    Caretaker(state, link).look()
    assert place.submission().state == "stopped"
    assert not link.carried


def stopped(state: StateFolder, *options: str) -> Result:
    return CliRunner().invoke(app, ["stop", "tiny", *options, "--state", str(state.path)])


def test_run_stopped_at_once_is_over_though_its_serverapp_dies_before_it_acts(
    state: StateFolder, place: RunPlace
) -> None:
    link, clock = Link(), Clock()
    caretaker = Caretaker(state, link, clock=clock)
    caretaker.look()
    process = serverapp(state, 1)  # it answers no call: it is about to die
    try:
        assert "does not answer" in stopped(state, "--after-round").stderr
        assert not place.stop_wish.exists()
        assert "does not answer" in stopped(state).stderr
    finally:
        kill(process)
    link.statuses[1] = "running"
    for _ in range(3):
        caretaker.look()
        clock.now_s += 100
    assert place.submission().state == "stopped"
    assert len(link.carried) == 1


def test_serverapp_that_begins_while_the_run_is_stopped_finds_the_wish(
    state: StateFolder, place: RunPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    look = RunPlace.is_live

    def begins_before(asked: RunPlace) -> bool:
        found.append(asked.stop_wish.exists())  # what a ServerApp sees that has the lease from now on
        return look(asked)

    monkeypatch.setattr(RunPlace, "is_live", begins_before)
    assert stopped(state).exit_code == 0
    assert found
    assert all(found)


def test_run_that_was_stopped_is_submitted_again_when_asked_for(state: StateFolder, place: RunPlace) -> None:
    link = Link()
    caretaker = Caretaker(state, link)
    caretaker.look()
    place.write_outcome(Outcome(fence=1, ended="stopped"))
    caretaker.look()
    assert place.submission().state == "stopped"
    place.stop_wish.touch()
    ask_for_run(state, run_config(), again=True)
    caretaker.look()
    assert place.submission().state == "submitted"
    assert [values["run-fence"] for values in link.carried] == [1, 3]


def test_sites_are_registered_before_runs_are_submitted(state: StateFolder, place: RunPlace) -> None:
    Enrolment(state).add("one", site_key()[1])
    link = Link()
    Caretaker(state, link).look()
    assert link.registered == ["one"]
    assert Enrolment(state).settled()


def test_runs_are_looked_after_while_a_site_cannot_be_turned_away(
    state: StateFolder, place: RunPlace, caplog: pytest.LogCaptureFixture
) -> None:
    enrolment, link = Enrolment(state), Link()
    enrolment.add("one", site_key()[1])
    enrolment.reconcile(link)
    enrolment.revoke("one")
    Caretaker(state, link).look()
    assert "not in step" in caplog.text
    assert place.submission().state == "submitted"
    assert not enrolment.settled()


def test_name_is_taken_once_and_goes_on_only_when_over_with_the_same_config(state: StateFolder) -> None:
    place = ask_for_run(state, run_config())
    with pytest.raises(RunError, match="is there already"):
        ask_for_run(state, run_config())
    with pytest.raises(RunError, match="not over"):
        ask_for_run(state, run_config(), again=True)
    place.write(place.submission().model_copy(update={"state": "stopped"}))
    with pytest.raises(ConfigError, match="another config"):
        ask_for_run(state, run_config(seed=5), again=True)
    assert ask_for_run(state, run_config(), again=True).submission().state == "waiting"


def test_simulation_is_no_run_for_a_coordinator(state: StateFolder) -> None:
    with pytest.raises(ConfigError, match="simulation"):
        ask_for_run(state, run_config(simulation={}))
    assert known_runs(state) == []


def test_unknown_run_is_named_with_those_there_are(state: StateFolder, place: RunPlace) -> None:
    with pytest.raises(ConfigError, match="expected one of: tiny"):
        find_run(state, "../tiny")
