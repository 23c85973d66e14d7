"""A site behind a slow link that breaks: its update arrives, its pieces sent again; a round waits for it no longer
than its deadline.

Two links: real TCP over 1 Mbit/s, 300 ms and 2 % of lost packets, in a network namespace, where the machine lets us;
and a relay that cuts connections, everywhere.

Each link takes five minutes; they run where FEDTUNE_BAD_LINK is set.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.agent.channel import status_of
from client.places import Places
from client.site_config import load_site_config
from common.config.load import dump_run_config, parse_run_config
from common.config.run import RunConfig
from server.run_place import RunPlace, find_run
from server.state_folder import StateFolder
from simulations.local_federation.bad_link import HERE, BadLink, Quality, bad_link, why_not
from simulations.local_federation.commands import LOOPBACK, WAIT_S, command, json_of, wait_for
from simulations.local_federation.federation import LocalFederation, Way, local_coordinator, real_sites
from simulations.local_federation.relay import Relay, relayed
from simulations.local_federation.rows import write_site_rows
from tests.conftest import config_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FEDTUNE_BAD_LINK" not in os.environ, reason="FEDTUNE_BAD_LINK is not set"),
]

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.5, "sample_rate": 0.5}
BREAK_S = 35.0
"""Seconds without the link: more than the gateway waits for the rest of a body, and Flower for an answer."""
NAMESPACE = f"ft{os.getpid()}"


@dataclass
class Behind:
    """A federation of two sites, one of them behind a link."""

    federation: LocalFederation
    link: BadLink | Relay
    near: str
    far: str
    folder: Path
    config: Path

    def submit(self, name: str, *overrides: str) -> RunPlace:
        self.federation.submit(self.config, f"name={name}", *overrides)
        return find_run(StateFolder.open(self.federation.state), name)

    def agent(self) -> dict[str, Any]:
        """What the agent behind the link says of itself."""
        places = Places.beside(self.folder / "site.yaml")
        return status_of(places.socket(load_site_config(places.site_config)), wait_s=WAIT_S)

    def rounds(self, place: RunPlace) -> list[dict[str, Any]]:
        return list(place.folder.iterate_records("round"))

    def ledger_rounds(self) -> list[list[int]]:
        """The rounds that the ledger behind the link has, of each run."""
        return [run["rounds"] for run in json_of("client", "ledger", self.folder / "site.yaml")["runs"]]


def config_in(folder: Path, model: Path) -> RunConfig:
    (folder / "source").mkdir()
    text = config_text(
        folder / "source", model, adapter={"rank": 512, "alpha": 512}, privacy=PRIVATE, evaluation={"enabled": False},
        training={"lr": 0.01, "batch_size": 4, "local_steps": 1}, federation={"rounds": 2, "min_sites": 2},
    )  # fmt: skip
    return parse_run_config(text, "test", None)


@contextlib.contextmanager
def over_relay(federation_in: Callable[..., Any]) -> Iterator[tuple[Any, Any, Way]]:
    with federation_in(LOOPBACK) as federation:
        port = int(federation.address.rpartition(":")[2])
        with relayed((LOOPBACK, port), bits_per_s=1e6) as relay:
            yield federation, relay, Way(address=relay.address)


@contextlib.contextmanager
def over_packets(federation_in: Callable[..., Any]) -> Iterator[tuple[Any, Any, Way]]:
    with bad_link(NAMESPACE, Quality()) as link, federation_in(HERE) as federation:
        yield federation, link, Way(inside=("ip", "netns", "exec", NAMESPACE))


LINKS = {"relay": over_relay, "packets": over_packets}


@pytest.fixture(scope="module", params=sorted(LINKS))
def behind(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[Behind]:
    if request.param == "packets" and (reason := why_not()):
        pytest.skip(f"a network namespace with a bad link {reason}")
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = config_in(folder, tiny_models["bert"])
        files = write_site_rows(config, 2, folder)
        near, far = sorted(files)
        (folder / "run.yaml").write_text(dump_run_config(config), encoding="utf-8")

        def federation_in(host: str) -> Any:
            return local_coordinator(folder, "local", lambda said: None, host)

        with (
            LINKS[request.param](federation_in) as (federation, link, way),
            real_sites(federation, config, files, 1000.0, {far: way}),
        ):
            yield Behind(federation, link, near, far, files[far].parent, folder / "run.yaml")


def test_update_arrives_though_the_link_breaks_under_it(behind: Behind) -> None:
    trained = behind.agent()["rounds"]
    place = behind.submit("broken")
    wait_for(lambda: behind.agent()["rounds"] > trained, "the first update")
    sent = behind.link.up.carried
    wait_for(lambda: behind.link.up.carried > sent + 150_000, "a part of the upload")
    with behind.link.broken():
        time.sleep(BREAK_S)
        assert place.completed_rounds() == 0
    assert behind.federation.wait_until_over(place.name)["submissions"] == 1
    rounds = behind.rounds(place)
    assert [record["round"] for record in rounds] == [1, 2]
    assert all(site["status"] == "admitted" for record in rounds for site in record["sites"].values())
    assert behind.agent()["rounds"] == trained + 2  # nothing was trained a second time
    assert behind.ledger_rounds() == [[1, 2]]


def test_round_closes_at_its_deadline_and_the_site_comes_back(behind: Behind) -> None:
    deadline = 60
    place = behind.submit("late", "federation.min_sites=1", "federation.rounds=4")
    state = ("--state", behind.federation.state)
    wait_for(lambda: place.completed_rounds() == 1, "a round of both")
    command("server", "pause", place.name, *state)
    wait_for(lambda: json_of("server", "status", place.name, *state)["phase"] == "paused", "the pause")
    done = place.completed_rounds()
    command("server", "set", place.name, f"round_timeout_s={deadline}", *state)
    with behind.link.broken():
        command("server", "resume", place.name, *state)
        wait_for(lambda: place.completed_rounds() == done + 1, "a round without the site")
        command("server", "pause", place.name, *state)
    closed = behind.rounds(place)[done]
    assert closed["sites"][behind.near]["status"] == "admitted"
    assert closed["sites"][behind.far]["status"] != "admitted"
    assert closed["seconds"]["total"] < 2 * deadline
    behind.federation.wait_until_connected()
    command("server", "set", place.name, "round_timeout_s=3600", *state)
    command("server", "resume", place.name, *state)
    behind.federation.wait_until_over(place.name)
    assert behind.rounds(place)[-1]["sites"][behind.far]["status"] == "admitted"
