"""The faulty Grid around others: order of arrival, deadlines, resuming, and what it leaves alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

import server.app
import simulations.faults.around
import simulations.run
from client.agreement import agreed_config
from client.site_config import SiteConfig
from common.codecs.codec import encode
from common.codecs.packing import Packing
from common.config.load import dump_run_config, load_run_config
from common.config.run import RunConfig
from common.errors import ConfigError
from common.flower_keys import CONFIG_YAML
from common.flower_records import to_records
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.wire import TrainRequest, header_bytes
from server.transport import exchange
from simulations.check import check_run
from simulations.engines.app_handler import FIRST_NODE_ID
from simulations.engines.catalog import open_engine
from simulations.engines.engine import Request
from simulations.engines.inprocess import InProcessEngine
from simulations.engines.settings import EngineSettings
from simulations.engines.site_handler import site_handler
from simulations.faults.faults import Faults
from simulations.faults.faulty_grid import NODE_UNAVAILABLE, FaultyGrid
from simulations.faults.replay import OldAnswers
from simulations.faults.work import TokensDone
from simulations.grid import VirtualGrid
from simulations.run import simulate
from tests.simulations.test_run import StopAfter, adapter_of, same

SITES = ("site 0", "site 1", "site 2")
SLOW = [
    {"name": "slow", "sites": ["site 0"], "step_s": 3.0},
    {"name": "fast", "sites": ["site 2"], "step_s": 0.5},
    {"name": "middling", "sites": ["site 1"], "step_s": 1.0},
]
STEPS = 3
"""Of a round: 12 rows in batches of 4."""


def faulty(config: RunConfig, folder: Path, inner: VirtualGrid | None = None) -> FaultyGrid:
    grid = VirtualGrid(open_engine(EngineSettings(), config, 3), 3) if inner is None else inner
    faults = Faults.of(config, SITES)
    assert faults is not None
    tokens = TokensDone(config, resident_model(config), SITES)
    return FaultyGrid(grid, faults, FIRST_NODE_ID, Packing.of_update(config.communication), tokens, OldAnswers(folder))


def requests(config: RunConfig, number: int) -> dict[str, Message]:
    model = resident_model(config)
    payload = encode(initial_adapter(model, config.seed), "fp32")
    return {
        site: Message(
            to_records(
                header_bytes(
                    TrainRequest(
                        config_digest=config.digest(), run="0" * 32, round=number, nonce=secrets.token_hex(16),
                        base_fingerprint=model.base.fingerprint,
                    )
                ),
                payload,
            ),
            FIRST_NODE_ID + place, MessageType.TRAIN, group_id=str(number),
        )
        for place, site in enumerate(SITES)
    }  # fmt: skip


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in RunFolder(folder).records() if record["kind"] == "round"]


def statuses(folder: Path) -> list[dict[str, str]]:
    return [{site: o["status"] for site, o in record["sites"].items()} for record in rounds_of(folder)]


def test_replies_come_in_the_order_of_simulated_arrival(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(simulation={"profiles": SLOW})
    grid = faulty(config, tmp_path)
    arrived = [(key, grid.clock.now()) for key, _ in exchange(grid, requests(config, 1), 100.0, grid.clock)]
    assert arrived == [("site 2", 0.5 * STEPS), ("site 1", 1.0 * STEPS), ("site 0", 3.0 * STEPS)]
    sites = grid.round_notes(1)["simulated_s"]["sites"]
    assert {site: known["compute"] for site, known in sites.items()} == {"site 0": 9.0, "site 1": 3.0, "site 2": 1.5}
    assert grid.round_notes(1)["simulated_s"]["round"] == 9.0


def test_deadline_in_simulated_seconds_makes_slow_sites_late(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(simulation={"profiles": SLOW}, federation={"rounds": 2, "round_timeout_s": 3.0})
    alone = EngineSettings(cohort=1)
    summary = simulate(config, tmp_path / "run", engine=alone)
    assert statuses(tmp_path / "run") == [{"site 0": "late", "site 1": "admitted", "site 2": "admitted"}] * 2
    assert [record["simulated_s"]["round"] for record in rounds_of(tmp_path / "run")] == [3.0, 3.0]
    assert summary["simulated_s"]["rounds"] == 6.0
    assert summary["simulated_s"]["sites"]["site 0"]["compute"] == 18.0
    absent = make_config(simulation={"windows": [{"site": "site 0", "from_round": 9}]}, federation={"rounds": 2})
    simulate(absent, tmp_path / "absent", engine=alone)
    assert same(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "absent"))


def test_round_takes_as_long_as_its_slowest_site_by_hand(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    profiles = [{"name": "all", "share": 1.0, "step_s": 2.0, "up_mbit_s": 0.1, "down_mbit_s": 0.4, "latency_s": 0.05}]
    simulate(make_config(simulation={"profiles": profiles}), tmp_path / "run")
    for record in rounds_of(tmp_path / "run"):
        by_hand = {}
        for site, outcome in record["sites"].items():
            parts = record["simulated_s"]["sites"][site]
            assert parts["compute"] == 2.0 * outcome["steps"]
            assert parts["up"] == pytest.approx(0.05 + outcome["bytes_up"] * 8 / 1e5)
            assert parts["down"] == pytest.approx(0.05 + outcome["bytes_down"] * 8 / 4e5)
            by_hand[site] = sum(parts.values())
        assert record["simulated_s"]["round"] == pytest.approx(max(by_hand.values()))


def test_site_that_is_gone_fails_when_the_coordinator_notices(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    gone = {"windows": [{"site": "site 1", "from_round": 2}], "notice_s": 7.0}
    simulate(make_config(simulation=gone), tmp_path / "run")
    first, second = rounds_of(tmp_path / "run")
    assert (first["sites"]["site 1"]["status"], second["sites"]["site 1"]["status"]) == ("failed", "admitted")
    assert first["sites"]["site 1"]["reason"].startswith(f"Flower error {NODE_UNAVAILABLE}")
    assert (first["simulated_s"]["round"], second["simulated_s"]["round"]) == (7.0, 0.0)
    unnoticed = make_config(simulation=gone | {"notice_s": None}, federation={"round_timeout_s": 100.0})
    simulate(unnoticed, tmp_path / "unnoticed")
    assert rounds_of(tmp_path / "unnoticed")[0]["sites"]["site 1"]["status"] == "late"
    assert rounds_of(tmp_path / "unnoticed")[0]["simulated_s"]["round"] == 100.0


def test_late_update_is_there_for_a_coordinator_that_still_asks_for_it(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(simulation={"stale": {"probability": 1.0, "rounds": 2}}, federation={"rounds": 4})
    grid = faulty(config, tmp_path)
    old = grid.push_messages(requests(config, 1).values())
    assert grid.pull_messages(old) == []
    grid.clock.wait(50.0)
    assert grid.pull_messages(old) == []
    grid.push_messages(requests(config, 2).values())
    assert grid.pull_messages(old) == []
    grid.push_messages(requests(config, 3).values())
    came = [reply for _ in old for reply in grid.pull_messages(old)]
    assert sorted(reply.metadata.reply_to_message_id for reply in came) == sorted(old)
    assert all(reply.has_content() for reply in came)
    assert grid.pull_messages(old) == []


def test_late_update_is_dropped_by_the_coordinator_today(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    simulation = {"stale": {"probability": 0.5, "rounds": 1}}
    config = make_config(simulation=simulation, federation={"rounds": 4, "round_timeout_s": 9.0}, seed=1)
    simulate(config, tmp_path / "run")
    faults = Faults.of(config, SITES)
    assert faults is not None
    expected = [{s: "late" if faults.rounds_late(s, n) else "admitted" for s in SITES} for n in range(1, 5)]
    assert statuses(tmp_path / "run") == expected
    assert {"late", "admitted"} <= {status for known in expected for status in known.values()}


EVERYTHING: dict[str, Any] = {
    "dropout": 0.2, "jitter": 0.4, "stale": {"probability": 0.1}, "churn": {"leave": 0.1, "join": 0.9},
    "profiles": [
        {"name": "fast", "share": 0.5, "tokens_per_s": 50.0, "up_mbit_s": 1.0},
        {"name": "flaky", "share": 0.5, "step_s": 1.0, "dropout": 0.3},
    ],
    "attacks": [{"name": "replay", "sites": ["site 1"]}, {"name": "gaussian_noise", "share": 0.34, "from_round": 2}],
}  # fmt: skip


class NewestFirst(InProcessEngine):
    """Handles requests in the opposite order."""

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(list(reversed(requests)))


class Hesitant(VirtualGrid):
    """Sometimes has nothing yet, as with workers."""

    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        return super().pull_messages(message_ids) if self.pulls % 3 else []


def newest_first(
    settings: EngineSettings, config: RunConfig, nodes: int, device: str, node: Any, rows: Sequence[int]
) -> NewestFirst:
    return NewestFirst(site_handler(dump_run_config(config), nodes, device, node))


def test_order_of_computing_changes_nothing(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(simulation=EVERYTHING, federation={"rounds": 4}, seed=2)
    first = simulate(config, tmp_path / "first", engine=EngineSettings(cohort=1))
    monkeypatch.setattr(simulations.run, "VirtualGrid", Hesitant)
    monkeypatch.setattr(simulations.run, "open_engine", newest_first)
    second = simulate(config, tmp_path / "second")
    assert same(adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second"))
    assert statuses(tmp_path / "first") == statuses(tmp_path / "second")
    assert first["simulated_s"] == second["simulated_s"]
    assert {"admitted", "failed", "rejected"} <= {s for known in statuses(tmp_path / "first") for s in known.values()}


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_has_the_same_faults(make_config: Callable[..., RunConfig], tmp_path: Path, stop: int) -> None:
    config = make_config(simulation=EVERYTHING, federation={"rounds": 5}, seed=2)
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfter(stop))
    resumed = simulate(config, tmp_path / "cut", resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut"))
    assert statuses(tmp_path / "whole") == statuses(tmp_path / "cut")
    assert resumed["simulated_s"]["rounds"] == pytest.approx(whole["simulated_s"]["rounds"])
    assert resumed["simulated_s"]["sites"] == whole["simulated_s"]["sites"]


def test_without_the_section_nothing_changes(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_empty = simulate(make_config(simulation={}), tmp_path / "empty")
    assert with_empty["simulated_s"]["rounds"] == 0.0
    monkeypatch.setattr(simulations.faults.around, "FaultyGrid", lambda *_: pytest.fail("a faulty Grid was made"))
    summary = simulate(make_config(), tmp_path / "plain")
    assert same(adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "empty"))
    assert "simulated_s" not in summary
    assert all("simulated_s" not in record for record in rounds_of(tmp_path / "plain"))
    assert "simulation" not in (tmp_path / "plain" / "config.yaml").read_text()
    assert load_run_config(tmp_path / "plain" / "config.yaml") == make_config()
    assert check_run(make_config())["simulation"] == []


def test_check_says_what_is_configured_and_the_run_agrees(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(simulation=EVERYTHING, federation={"rounds": 4}, seed=2)
    first, second = check_run(config)["simulation"]
    simulate(config, tmp_path / "run")
    answered = sum(status != "failed" for known in statuses(tmp_path / "run") for status in known.values())
    assert f"of 12 site rounds {answered} answer" in first
    assert "2 fast, 1 flaky" in first
    assert second.startswith("Hostile. replay by site 1; gaussian_noise by site ")


def test_serverapp_and_real_site_refuse_the_section(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(simulation={"dropout": 0.5})
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={CONFIG_YAML: dump_run_config(config)}
    )
    with pytest.raises(ConfigError, match=r"^simulation is set"):
        server.app.main(VirtualGrid(open_engine(EngineSettings(), config, 3), 3), context)
    with pytest.raises(ConfigError, match=r"^simulation of the run is set"):
        agreed_config(config, SiteConfig.model_construct())
