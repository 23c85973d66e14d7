"""SCAFFOLD's variates at the coordinator: whose mean c is, what of a site is believed, what a restart leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.personal import PersonalStore
from client.variates import keep_variates, variates_before
from common.config.run import RunConfig
from common.errors import AdmissionError
from common.tensors import manifest_of
from common.variates import change_of, marked
from server.cohort import admit_members
from server.variates import ControlRound, Controls
from tests.server.test_rounds import description
from tests.simulations.test_control_variates import scaffold


def play(config: RunConfig, before: Controls, own: dict[str, float], pulls: dict[str, float], number: int) -> Controls:
    """A round of sites whose gradients are constant; ``own`` is c_i by site, as each keeps it."""
    current = ControlRound(number, before, {"x": torch.zeros(1)}, config, dict.fromkeys(pulls, 1.0), 1.0)
    c, steps = float(current.shared["x"]), config.training.local_steps or 0
    for site, pull in pulls.items():
        kept = own[site] if current.taken(site) else 0.0
        update = {"x": torch.tensor([-config.training.lr * steps * (pull - kept + c)])}
        change = change_of(update, current.shared, config.training, steps)
        current.add(site, current.admit({**update, **marked(change)}, steps, 5)[1], 1.0)
        own[site] = kept + float(change["x"])
    return current.finish()


def test_shared_variate_is_the_mean_of_the_sites_that_take_part_now(make_config: Callable[..., RunConfig]) -> None:
    config, own, controls = scaffold(make_config), {}, Controls()
    pulls = {"a": 1.0, "b": 3.0}
    for number, changed in enumerate((pulls, pulls, {**pulls, "late": -4.0}, {**pulls, "late": -4.0}, {"a": 1.0}), 1):
        controls = play(config, controls, own, changed, number)
        assert float(controls.shared["x"]) == pytest.approx(sum(changed.values()) / len(changed), abs=1e-5)
        assert [own[site] for site in changed] == pytest.approx(list(changed.values()), abs=1e-5)


@pytest.mark.parametrize("told", [1, 3, 5, 10**7])
def test_steps_that_were_not_planned_are_rejected(make_config: Callable[..., RunConfig], told: int) -> None:
    config = scaffold(make_config)
    current = ControlRound(1, Controls(), {"x": torch.zeros(1)}, config, {"a": 1.0}, 1.0)
    update = {"x": torch.tensor([-1.0])}
    with pytest.raises(AdmissionError, match=f"variates: {told} steps were taken; expected 4"):
        current.admit({**update, **marked(change_of(update, current.shared, config.training, told))}, told, 5)


@pytest.mark.parametrize(("rows", "steps"), [(5, 2), (8, 2), (9, 4)])
def test_steps_follow_from_the_rows_that_a_site_declared(
    make_config: Callable[..., RunConfig], rows: int, steps: int
) -> None:
    config = scaffold(make_config, training={"local_steps": None, "local_epochs": 2, "batch_size": 8})
    current = ControlRound(1, Controls(), {"x": torch.zeros(1)}, config, {"a": 1.0}, 1.0)
    update = {"x": torch.tensor([-1.0])}
    sent = {**update, **marked(change_of(update, current.shared, config.training, steps))}
    assert current.admit(sent, steps, rows)[0].keys() == {"x"}
    with pytest.raises(AdmissionError, match=f"{steps} steps were taken"):
        current.admit(sent, steps, rows + 8)


def test_variates_that_start_again_leave_what_an_earlier_checkpoint_asks_for(tmp_path: Path) -> None:
    store, run = PersonalStore.of_virtual_site(tmp_path / "sites.db", "site 0"), "0" * 32
    one = {"x": torch.ones(1)}
    for number in range(1, 5):
        keep_variates(store, run, number, number - 1, {"x": torch.full((1,), float(number))}, {"x": torch.zeros(1)})
    keep_variates(store, run, 5, 0, {"x": torch.zeros(1)}, one)  # the round is lost: nobody took it
    assert float(variates_before(store, run, 4, manifest_of(one))["x"]) == 4.0
    keep_variates(store, run, 5, 4, one, one)
    assert float(variates_before(store, run, 5, manifest_of(one))["x"]) == 2.0


def test_site_that_declares_no_rows_takes_no_part(make_config: Callable[..., RunConfig]) -> None:
    told = description("one", num_examples=None)
    base, initial = told.base_fingerprint, told.initial_fingerprint
    assert admit_members({1: told}, scaffold(make_config, on=False), base, initial)[1] == {}
    assert "declares no number of rows" in admit_members({1: told}, scaffold(make_config), base, initial)[1][1]
