"""What a search costs in privacy: every record is bounded, wherever the runs put it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.privacy.accounting import Segment, epsilon_spent
from common.run_folder import RunFolder
from simulations.sweep.cost import cost_sentences, search_cost
from tests.server.run_configs import run_config

LITTLE, MUCH = Segment(0.9, 0.2, 50), Segment(2.0, 0.2, 50)
"""Steps with little and with much noise."""
DRAWN = {"kind": "iid", "sites": 2}


def private_config(partition: dict[str, Any], seed: int = 0, **data: Any) -> RunConfig:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}
    return run_config(seed=seed, privacy=privacy, data={"partition": partition, **data})


def log_run(folder: Path, spent: dict[str, Segment]) -> Path:
    """The log of a run of one round, with what each site spent."""
    log = RunFolder(folder)
    log.create()
    log.log({"kind": "start", "sites": list(spent)})
    sites = {site: {"mechanism": asdict(segment)} for site, segment in spent.items()}
    log.log({"kind": "round", "round": 1, "sites": sites})
    return folder


@pytest.mark.parametrize(
    ("first", "second", "deals"),
    [
        (private_config({}, 0), private_config({}, 1), 1),
        (private_config({}, max_length=16), private_config({}, max_length=64), 1),
        (private_config(DRAWN), private_config(DRAWN), 1),
        (private_config(DRAWN, 0), private_config(DRAWN, 1), 2),
        (private_config(DRAWN), private_config({"kind": "size", "sites": 2}), 2),
        (private_config({"column": "site"}), private_config({"column": "ward"}), 2),
    ],
    ids=["column", "length", "drawn-alike", "drawn-by-seed", "searched", "other-column"],
)
def test_search_bounds_every_record_wherever_runs_put_it(
    tmp_path: Path, first: RunConfig, second: RunConfig, deals: int
) -> None:
    runs = [
        (first, log_run(tmp_path / "1", {"site-0": LITTLE, "site-1": MUCH})),
        (second, log_run(tmp_path / "2", {"site-0": MUCH, "site-1": LITTLE})),
    ]
    cost = search_cost(runs, runs[:1])
    assert cost is not None
    found = cost["site_records"]
    assert found["deals"] == deals
    assert found["epsilon_of_best"] == epsilon_spent([LITTLE], 1e-5, "rdp")
    if deals == 1:  # each record had little noise once
        assert found["epsilon_of_search"] == epsilon_spent([LITTLE, MUCH], 1e-5, "rdp")
        return
    # A record may have had little noise both times.
    assert found["epsilon_of_search"] >= epsilon_spent([LITTLE, LITTLE], 1e-5, "rdp")
    assert found["epsilon_of_search"] == pytest.approx(2 * epsilon_spent([LITTLE], 0.5e-5, "rdp"))
    assert "dealt to sites in 2 ways" in cost_sentences(cost, "held-out rows")[0]
