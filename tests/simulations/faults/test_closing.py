"""Rounds on the simulated clock: over-selection, minima, late updates and the asynchronous mode, by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import server.bounds
import server.collected
from common.config.run import RunConfig
from common.errors import RunError
from common.run_folder import RunFolder
from server.steering import Steering
from simulations.engines.settings import EngineSettings
from simulations.run import simulate
from simulations.study.curves import curve
from tests.simulations.faults.test_faulty_grid import SLOW, STEPS, rounds_of, statuses
from tests.simulations.test_run import PRIVATE, StopAfter, adapter_of, same

ALONE = EngineSettings(cohort=1)
NEARLY = [{**SLOW[0], "step_s": 2.9}, *SLOW[1:]]
"""With these site 0 answers while the third round of three seconds is on, and not as it ends."""
FAST, MIDDLING, SLOWEST = 0.5 * STEPS, 1.0 * STEPS, 3.0 * STEPS
"""Seconds of site 2, site 1 and site 0."""

MakeConfig = Callable[..., RunConfig]


def seconds(folder: Path) -> list[float]:
    return [record["simulated_s"]["round"] for record in rounds_of(folder)]


def carried(folder: Path) -> list[list[tuple[str, int, str]]]:
    return [[(c["site"], c["round"], c["status"]) for c in record.get("carried", ())] for record in rounds_of(folder)]


def test_over_selection_closes_the_round_at_the_wanted_number(make_config: MakeConfig, tmp_path: Path) -> None:
    over = {"rounds": 2, "sites_per_round": 2, "over_select": 1.3}
    config = make_config(simulation={"profiles": SLOW}, federation=over)
    summary = simulate(config, tmp_path / "run", engine=ALONE)
    both = {"site 1": "admitted", "site 2": "admitted"}
    assert statuses(tmp_path / "run") == [{"site 0": "spare", **both}, both]  # site 0 is at work still
    assert seconds(tmp_path / "run") == [MIDDLING, MIDDLING]
    absent = make_config(simulation={"windows": [{"site": "site 0", "from_round": 9}]})
    simulate(absent, tmp_path / "absent", engine=ALONE)
    assert same(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "absent"))
    assert summary["bytes_up"]["site 0"] == [0, None]


def test_spare_site_is_asked_again_once_it_has_answered(make_config: MakeConfig, tmp_path: Path) -> None:
    over = {"rounds": 5, "sites_per_round": 2, "over_select": 1.5}
    simulate(make_config(simulation={"profiles": NEARLY}, federation=over), tmp_path / "run", engine=ALONE)
    # Rounds take 3 s, site 0 takes 8.7: asked at 0 s, it answers while round 3 is on.
    asked = ["site 0" in record["sites"] for record in rounds_of(tmp_path / "run")]
    assert asked == [True, False, False, True, False]
    assert all(record["sites"]["site 0"]["status"] == "spare" for record in rounds_of(tmp_path / "run")[::3])
    assert carried(tmp_path / "run") == [[], [], [("site 0", 1, "spare")], [], []]


def test_sites_that_answer_at_one_moment_count_in_turn(make_config: MakeConfig, tmp_path: Path) -> None:
    over = {"rounds": 20, "sites_per_round": 1, "over_select": 3.0}
    simulate(make_config(federation=over), tmp_path / "run", engine=ALONE)
    first = [site for record in statuses(tmp_path / "run") for site, status in record.items() if status == "admitted"]
    assert len(first) == 20
    assert min(Counter(first)[site] for site in ("site 0", "site 1", "site 2")) >= 3
    simulate(make_config(federation=over), tmp_path / "again", engine=ALONE)
    assert statuses(tmp_path / "run") == statuses(tmp_path / "again")


def test_site_that_is_gone_unnoticed_is_asked_again_once_its_request_expired(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    over = {"rounds": 30, "sites_per_round": 1, "over_select": 3.0, "round_timeout_s": 30.0}
    gone = {"profiles": SLOW, "windows": [{"site": "site 0", "from_round": 2}], "notice_s": None}
    simulate(make_config(simulation=gone, federation=over), tmp_path / "run", engine=ALONE)
    asked = [record["round"] for record in rounds_of(tmp_path / "run") if "site 0" in record["sites"]]
    # Rounds take 1.5 s; its first request expires after 40 s, and then it is there.
    assert asked[0] == 1
    assert 27 <= asked[1] <= 29


def test_late_update_comes_also_in_a_round_that_asks_nobody(make_config: MakeConfig, tmp_path: Path) -> None:
    late = {"rounds": 4, "late": "carry", "below_min": "skip", "min_sites": 3, "round_timeout_s": 100.0}
    stale = {"stale": {"probability": 1.0, "rounds": 1}}
    simulate(make_config(simulation=stale, federation=late), tmp_path / "run", engine=ALONE)
    names = ["site 0", "site 1", "site 2"]
    assert [sorted(record["sites"]) for record in rounds_of(tmp_path / "run")] == [names, [], names, []]
    came = [sorted(site for site, _, status in late if status == "admitted") for late in carried(tmp_path / "run")]
    assert came == [[], names, [], names]


def test_run_that_an_operator_ends_is_evaluated_as_it_ends(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steering, "proceed", lambda self, number, grid: number <= 3)
    config = make_config(federation={"rounds": 9}, evaluation={"every": 2})
    summary = simulate(config, tmp_path / "run", engine=ALONE)
    assert summary["rounds"] == 3
    assert [record["round"] for record in RunFolder(tmp_path / "run").iterate_records("evaluation")] == [0, 2, 3]
    assert summary["metrics_after"]["test"]["overall"]


def test_rejected_updates_do_not_close_a_round(make_config: MakeConfig, tmp_path: Path) -> None:
    over = {"rounds": 1, "sites_per_round": 2, "over_select": 1.5}
    hostile = {"profiles": SLOW, "attacks": [{"name": "nan", "sites": ["site 2"]}]}
    simulate(make_config(simulation=hostile, federation=over), tmp_path / "run")
    assert statuses(tmp_path / "run") == [{"site 0": "admitted", "site 1": "admitted", "site 2": "rejected"}]
    assert seconds(tmp_path / "run") == [SLOWEST]


@pytest.mark.slow
def test_site_is_charged_for_having_been_asked_whether_or_not_its_update_counts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    late = {"rounds": 3, "round_timeout_s": MIDDLING, "late": "carry"}
    private = {"privacy": PRIVATE, "aggregation": {"method": "ffa_lora"}}
    carrying = simulate(make_config(simulation={"profiles": NEARLY}, federation=late, **private), tmp_path / "carry")
    asked = Counter(site for record in rounds_of(tmp_path / "carry") for site in record["sites"])
    assert asked == {"site 0": 1, "site 1": 3, "site 2": 3}
    assert [c[0] for c in carried(tmp_path / "carry")[2]] == ["site 0"]
    once = simulate(make_config(federation={"rounds": 1}, **private), tmp_path / "once")
    thrice = simulate(make_config(federation={"rounds": 3}, **private), tmp_path / "thrice")
    assert carrying["epsilon"]["site 0"] == once["epsilon"]["site 0"]
    assert carrying["epsilon"]["site 1"] == thrice["epsilon"]["site 1"]
    over = {"rounds": 3, "sites_per_round": 2, "over_select": 1.5}
    spare = simulate(make_config(simulation={"profiles": SLOW}, federation=over, **private), tmp_path / "spare")
    assert spare["epsilon"]["site 0"] == once["epsilon"]["site 0"]  # it is at work until the run is over
    assert spare["epsilon"]["site 1"] == thrice["epsilon"]["site 1"]


def test_late_update_counts_in_the_round_in_which_it_comes(make_config: MakeConfig, tmp_path: Path) -> None:
    late = {"rounds": 4, "round_timeout_s": 4.0, "late": "carry"}
    config = make_config(simulation={"profiles": SLOW}, federation=late)
    summary = simulate(config, tmp_path / "run", engine=ALONE)
    # Asked at 0, site 0 answers at 9 s: rounds 1 ends at 4 s, 2 and 3 at 7 and 10 s; it is asked again in round 4.
    assert carried(tmp_path / "run") == [[], [], [("site 0", 1, "admitted")], []]
    assert seconds(tmp_path / "run") == [4.0, MIDDLING, MIDDLING, 4.0]
    asked = [sorted(record["sites"]) for record in rounds_of(tmp_path / "run")]
    others = ["site 1", "site 2"]
    assert asked == [["site 0", *others], others, others, ["site 0", *others]]
    third = rounds_of(tmp_path / "run")[2]["carried"][0]
    assert (third["staleness"], third["bytes_down"], third["mechanism"]) == (2, 0, None)
    assert summary["bytes_up"]["site 0"] == [0, None, third["bytes_up"], 0]
    sent = sum(n or 0 for key in ("bytes_up", "bytes_down") for by in summary[key].values() for n in by)
    assert curve(tmp_path / "run", config, "accuracy")[-1].megabytes == pytest.approx(sent / 1e6, rel=1e-12)
    dropped = make_config(simulation={"profiles": SLOW}, federation=late | {"late": "drop"})
    simulate(dropped, tmp_path / "dropped", engine=ALONE)
    assert not same(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "dropped"))


def test_update_is_waited_for_no_longer_than_the_largest_staleness(make_config: MakeConfig, tmp_path: Path) -> None:
    late = {"rounds": 4, "round_timeout_s": 2.0, "late": "carry", "max_staleness": 1}
    simulate(make_config(simulation={"profiles": SLOW}, federation=late), tmp_path / "run")
    # Every 2 s a round ends (or at 1.5 s, where site 2 alone was asked and answers); site 1 takes 3 s, site 0 9 s.
    assert all(site == "site 1" for one in carried(tmp_path / "run") for site, _, _ in one)
    assert any(carried(tmp_path / "run"))
    asked_of_slowest = ["site 0" in record["sites"] for record in rounds_of(tmp_path / "run")]
    assert asked_of_slowest == [True, False, True, False]


@pytest.mark.parametrize("below_min", ["stop", "extend", "skip"])
def test_round_below_its_minimum_stops_is_extended_or_is_skipped(
    make_config: MakeConfig, tmp_path: Path, below_min: str
) -> None:
    few = {"rounds": 2, "min_sites": 3, "round_timeout_s": 2.0, "below_min": below_min, "extension_s": 10.0}
    config = make_config(simulation={"profiles": SLOW}, federation=few)
    if below_min == "stop":
        with pytest.raises(RunError, match="1 usable updates; expected at least 3"):
            simulate(config, tmp_path / "run")
        return
    simulate(config, tmp_path / "run", engine=ALONE)
    if below_min == "extend":
        assert seconds(tmp_path / "run") == [SLOWEST, SLOWEST]
        patient = make_config(simulation={"profiles": SLOW})
        simulate(patient, tmp_path / "patient", engine=ALONE)
        assert same(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "patient"))
        return
    assert [record["skipped"].startswith("round") for record in rounds_of(tmp_path / "run")] == [True, True]
    assert [known["site 2"] for known in statuses(tmp_path / "run")] == ["dropped", "dropped"]
    trained = load_file(next((tmp_path / "run" / "checkpoint").glob("*.safetensors")))
    assert all(not value.any() for name, value in trained.items() if name.endswith("lora_B.weight"))


@pytest.mark.parametrize("method", ["fedit", "flexlora"])
def test_round_that_makes_what_no_site_would_take_is_skipped(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(server.bounds, "_REACH", 2.0)
    monkeypatch.setattr(server.collected, "beyond_use", lambda *_: None)  # as where several made it together
    attack = {"attacks": [{"name": "scale_1000", "sites": ["site 1"], "to_round": 1}]}
    config = make_config(simulation=attack, aggregation={"method": method})
    summary = simulate(config, tmp_path / "run", engine=ALONE)
    first, second = rounds_of(tmp_path / "run")
    assert "which no site takes" in first["skipped"]
    assert {site["status"] for site in first["sites"].values()} == {"dropped"}
    assert "skipped" not in second
    assert summary["rounds"] == 2
    assert all(float(value.abs().max()) <= 2.0 for value in adapter_of(tmp_path / "run").values())


def test_extension_is_bounded(make_config: MakeConfig, tmp_path: Path) -> None:
    few = {"min_sites": 3, "round_timeout_s": 2.0, "below_min": "extend", "extension_s": 2.0}
    with pytest.raises(RunError, match="2 usable updates; expected at least 3"):
        simulate(make_config(simulation={"profiles": SLOW}, federation=few), tmp_path / "run")


def test_too_few_for_a_robust_rule_is_below_the_minimum_too(make_config: MakeConfig, tmp_path: Path) -> None:
    robust = {"robust": "median", "robust_sites": 1}
    gone = {"windows": [{"site": "site 1", "from_round": 2}]}
    config = make_config(simulation=gone, aggregation=robust, federation={"below_min": "skip"})
    simulate(config, tmp_path / "run")
    first, second = rounds_of(tmp_path / "run")
    assert "aggregation.robust 'median'" in first["skipped"]
    assert "skipped" not in second


@pytest.mark.parametrize("attack", ["nan", "extra_key", "replay"])
def test_bad_site_that_is_found_out_needs_no_others_to_outvote_it(
    make_config: MakeConfig, tmp_path: Path, attack: str
) -> None:
    robust = {"robust": "median", "robust_sites": 1}
    found_out = {"attacks": [{"name": attack, "sites": ["site 1"]}]}
    summary = simulate(make_config(simulation=found_out, aggregation=robust), tmp_path / "run", engine=ALONE)
    assert not any("skipped" in record for record in rounds_of(tmp_path / "run"))
    assert "rejected" in {known["site 1"] for known in statuses(tmp_path / "run")}
    assert summary["rounds"] == 2


ASYNC: dict[str, Any] = {"mode": "async", "buffer_size": 2, "rounds": 6}


@pytest.mark.slow
def test_async_moves_with_every_buffer_and_asks_again_as_sites_answer(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(simulation={"profiles": SLOW}, federation=ASYNC)
    summary = simulate(config, tmp_path / "run", engine=ALONE)
    records = rounds_of(tmp_path / "run")
    for record in records:
        own = [site for site, outcome in record["sites"].items() if outcome["status"] == "admitted"]
        assert len({*own, *(c["site"] for c in record["carried"])}) == 2  # none of them twice
    asked = Counter(site for record in records for site in record["sites"])
    came = Counter(c["site"] for record in records for c in record["carried"])
    came.update(s for record in records for s, o in record["sites"].items() if o["status"] == "admitted")
    assert all(0 <= asked[site] - came[site] <= 1 for site in asked)
    assert {c["site"] for record in records for c in record["carried"]} >= {"site 0"}
    waiting = make_config(simulation={"profiles": SLOW}, federation={"rounds": 6})
    whole = simulate(waiting, tmp_path / "sync", engine=ALONE)
    assert summary["simulated_s"]["rounds"] < whole["simulated_s"]["rounds"] / 2
    # Whose answers were used: per simulated second the buffer takes more of them than rounds that wait do.
    assert 12 / summary["simulated_s"]["rounds"] > 18 / whole["simulated_s"]["rounds"]


def test_async_with_a_buffer_of_all_and_equal_sites_is_the_synchronous_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    simulate(make_config(), tmp_path / "sync", engine=ALONE)
    whole = {"mode": "async", "buffer_size": 3}
    simulate(make_config(federation=whole), tmp_path / "async", engine=ALONE)
    assert same(adapter_of(tmp_path / "sync"), adapter_of(tmp_path / "async"))
    assert statuses(tmp_path / "sync") == statuses(tmp_path / "async")


def test_async_goes_on_without_sites_that_are_gone(make_config: MakeConfig, tmp_path: Path) -> None:
    gone = {"profiles": SLOW, "windows": [{"site": "site 2", "from_round": 99}], "notice_s": None}
    config = make_config(simulation=gone, federation=ASYNC | {"max_staleness": 2, "round_timeout_s": 20.0})
    summary = simulate(config, tmp_path / "run")
    assert summary["rounds"] == 6
    assert all(record["sites"] or record["carried"] for record in rounds_of(tmp_path / "run"))


def test_late_updates_of_a_stopped_run_are_lost_and_the_run_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    late = {"rounds": 4, "round_timeout_s": 4.0, "late": "carry"}
    config = make_config(simulation={"profiles": SLOW}, federation=late)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=StopAfter(3))
    summary = simulate(config, tmp_path / "run", resume=True)
    assert summary["rounds"] == 4
    assert sorted(rounds_of(tmp_path / "run")[2]["sites"]) == ["site 0", "site 1", "site 2"]
    assert carried(tmp_path / "run") == [[], [], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("federation", [ASYNC, {"late": "carry", "round_timeout_s": 4.0, "rounds": 4}])
def test_who_computes_first_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federation: dict[str, Any]
) -> None:
    import simulations.run
    from tests.simulations.faults.test_faulty_grid import Hesitant, newest_first

    config = make_config(simulation={"profiles": SLOW, "jitter": 0.3}, federation=federation)
    simulate(config, tmp_path / "first", engine=ALONE)
    monkeypatch.setattr(simulations.run, "VirtualGrid", Hesitant)
    monkeypatch.setattr(simulations.run, "open_engine", newest_first)
    simulate(config, tmp_path / "second")
    assert same(adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second"))
    assert carried(tmp_path / "first") == carried(tmp_path / "second")


def test_server_optimizer_and_robust_rule_take_late_updates(make_config: MakeConfig, tmp_path: Path) -> None:
    federation = {"late": "carry", "round_timeout_s": 4.0, "rounds": 4}
    aggregation = {"server_optimizer": "fedavgm", "robust": "norm_clip", "robust_sites": 0}
    simulate(make_config(simulation={"profiles": SLOW}, federation=federation, aggregation=aggregation), tmp_path / "r")
    assert any(carried(tmp_path / "r"))
    assert all(torch.isfinite(value).all() for value in adapter_of(tmp_path / "r").values())
