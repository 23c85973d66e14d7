"""SCAFFOLD through the real round loop, wire and sites: limits, a slow reference, resume, engines, bytes, liars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from client.personal import virtual_states
from client.site import Site, virtual_site
from client.training.loop import _run_batch, train_locally
from client.training.site_round import SiteRound
from client.variates import Variates
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.methods import sent_names, trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.run_folder import RunFolder
from common.tensors import Tensors, add, l2_norm, subtract
from common.variates import PREFIX, marked, parted
from server.checkpoint import load_checkpoint
from server.events import Observer
from server.outcome import Outcome
from simulations.check import check_run
from simulations.engines.settings import EngineSettings
from simulations.run import simulate

SITES = 3


class StopAfter(Observer):
    """Presses Ctrl-C when the first site of a round has answered."""

    def __init__(self, number: int) -> None:
        self.number = number

    def site_answered(self, number: int, site: str, outcome: Outcome) -> None:
        if number == self.number:
            raise KeyboardInterrupt


def scaffold(make_config: Callable[..., RunConfig], on: bool = True, **sections: Any) -> RunConfig:
    training = {"optimizer": "sgd", "lr": 0.3, "local_steps": 4, "control_variates": on}
    return make_config(
        **{
            **sections,
            "training": training | sections.get("training", {}),
            "federation": {"rounds": 3} | sections.get("federation", {}),
        }
    )


def adapter_of(folder: Path) -> Tensors:
    found: Tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


def same_bits(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first: Tensors, second: Tensors) -> float:
    return l2_norm(subtract(first, second)) / l2_norm(second)


def test_first_round_is_the_plain_one(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for on in (False, True):
        simulate(scaffold(make_config, on, federation={"rounds": 1}), tmp_path / str(on))
    assert same_bits(adapter_of(tmp_path / "True"), adapter_of(tmp_path / "False"))


def test_one_site_alone_trains_as_without(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    partition = {"partition": {"kind": "iid", "sites": 1}}
    for on in (False, True):
        simulate(scaffold(make_config, on, data=partition), tmp_path / str(on))
    alone, plain = adapter_of(tmp_path / "True"), adapter_of(tmp_path / "False")
    assert distance(alone, plain) < 1e-5


def end_of(
    model: AdaptedModel, site: Site, config: RunConfig, start: Tensors, names: frozenset[str], c: Tensors, own: Tensors,
    number: int,
) -> Tensors:  # fmt: skip
    """y after a round's steps, the correction c - c_i written as a linear term of the loss."""
    model.load(start)
    parameters = model.train_only(names)
    current = SiteRound(model, parameters, site, config, number, None)
    with current as step:
        model.module.train()
        for batch in current.batches():
            linear = sum(((c[n] - own[n]) * p).sum() for n, p in parameters.items())
            torch.as_tensor(linear).backward()
            _run_batch(model, current, config, batch, step)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def reference(config: RunConfig, rounds: int) -> tuple[Tensors, Tensors]:
    """x and c after some rounds of all sites, with the paper's equations in float64 between rounds."""
    model = resident_model(config)
    x = initial_adapter(model, config.seed)
    names = trained_names(config, x)
    eta, steps = config.training.lr, config.training.local_steps or 0
    c = {name: torch.zeros_like(x[name]) for name in names}
    own = [dict(c) for _ in range(SITES)]
    for number in range(1, rounds + 1):
        ends, following = [], []
        for index in range(SITES):
            site = virtual_site(config, {"partition-id": index, "num-partitions": SITES}, model)
            y = end_of(model, site, config, x, names, c, own[index], number)
            ends.append(y)
            following.append({n: own[index][n] - c[n] + (x[n] - y[n]).double() / (steps * eta) for n in names})
        change = {n: sum(f[n] - o[n] for f, o in zip(following, own, strict=True)) / SITES for n in names}
        x = {n: torch.stack([y[n].double() for y in ends]).mean(0).float() if n in names else x[n] for n in x}
        c = {n: (c[n] + change[n]).float() for n in names}
        own = [{n: value.float() for n, value in each.items()} for each in following]
    return x, c


@pytest.mark.slow
def test_rounds_are_those_of_the_papers_equations(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = scaffold(make_config)
    simulate(config, tmp_path / "run")
    checkpoint = load_checkpoint(RunFolder(tmp_path / "run").checkpoint)
    x, c = reference(config, 3)
    plain = scaffold(make_config, on=False)
    simulate(plain, tmp_path / "plain")
    without = load_checkpoint(RunFolder(tmp_path / "plain").checkpoint).adapter
    got, wanted = checkpoint.adapter, {name: x[name] for name in checkpoint.adapter}
    assert distance(got, wanted) < 1e-4
    assert distance(without, wanted) > 10 * distance(got, wanted)
    assert distance(checkpoint.controls.shared, c) < 1e-3


def test_variates_average_to_the_coordinators(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = scaffold(make_config, federation={"rounds": 4, "sites_per_round": 2})
    simulate(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    checkpoint, states = load_checkpoint(folder.checkpoint), virtual_states(folder.sites)
    kept = [states.before(checkpoint.run, site, "variate", 9) for site in states.sites(checkpoint.run, "variate")]
    names = checkpoint.controls.shared
    mean = {n: torch.stack([own[n] for own in kept if own is not None]).sum(0) / SITES for n in names}
    assert distance(mean, checkpoint.controls.shared) < 1e-5
    assert set(checkpoint.controls.taken.values()) <= {1, 2, 3, 4}


def test_resumed_run_ends_on_the_same_bits(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = scaffold(make_config)
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfter(3))
    resumed = simulate(config, tmp_path / "cut", resume=True)
    assert same_bits(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut"))
    assert resumed["bytes_up"] == whole["bytes_up"]
    controls = [load_checkpoint(RunFolder(tmp_path / name).checkpoint).controls for name in ("whole", "cut")]
    assert same_bits(controls[0].shared, controls[1].shared)


def test_lost_changes_are_not_kept(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A reply that does not arrive leaves no gap between the mean of the sites' variates and the coordinator's."""
    config = scaffold(make_config, federation={"rounds": 5}, simulation={"dropout": 0.4})
    summary = simulate(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    checkpoint, states = load_checkpoint(folder.checkpoint), virtual_states(folder.sites)
    total: Tensors = {name: torch.zeros_like(value) for name, value in checkpoint.controls.shared.items()}
    for site, number in checkpoint.controls.taken.items():
        total = add(total, states.before(checkpoint.run, site, "variate", number + 1) or {})
    mean = {name: value / SITES for name, value in total.items()}
    assert distance(mean, checkpoint.controls.shared) < 1e-5
    assert summary["rounds"] == 5


@pytest.mark.parametrize(
    "engine",
    [
        EngineSettings(cohort=3),
        pytest.param(EngineSettings(name="processes", workers=2, cohort=1), marks=pytest.mark.slow),
    ],
    ids=["cohort", "processes"],
)
def test_engines_agree(make_config: Callable[..., RunConfig], tmp_path: Path, engine: EngineSettings) -> None:
    config = scaffold(make_config)
    simulate(config, tmp_path / "one", engine=EngineSettings(cohort=1))
    simulate(config, tmp_path / "other", engine=engine)
    first, second = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "other")
    assert same_bits(first, second) if engine.name == "processes" else distance(first, second) < 1e-5


def test_bytes_are_those_of_updates_and_variates(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    found: dict[bool, tuple[list[Tensors], list[Tensors]]] = {}
    sums = {}
    for on in (False, True):
        down: list[Tensors] = []
        up: list[Tensors] = []

        def watch(node: int, received: bytes, sent: bytes, down: list[Tensors] = down, up: list[Tensors] = up) -> None:
            if received and sent:
                down.append(load(received))
                up.append(load(sent))

        config = scaffold(make_config, on, aggregation={"method": "ffa_lora"})
        summary = simulate(config, tmp_path / str(on), watch=watch)
        found[on] = (down, up)
        sums[on] = [sum(n for counts in summary[key].values() for n in counts) for key in ("bytes_up", "bytes_down")]
    start = initial_adapter(resident_model(config), config.seed)
    sent = sent_names(config, start)
    for plain, with_variates in zip(found[False], found[True], strict=True):
        for before, after in zip(plain, with_variates, strict=True):
            assert after.keys() - before.keys() == {PREFIX + name for name in sent}
    size = 4 * sum(start[name].numel() for name in sent) * SITES * 3
    for plain_bytes, all_bytes in zip(sums[False], sums[True], strict=True):
        assert size <= all_bytes - plain_bytes < size + 400 * len(sent) * SITES * 3
    told = check_run(config)
    assert told is not None


def test_a_change_that_does_not_follow_is_rejected(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scaffold(make_config)
    honest = Variates.change

    def lie(self: Variates, *arguments: Any) -> Tensors:
        return {name: 1.01 * value for name, value in honest(self, *arguments).items()}

    monkeypatch.setattr(Variates, "change", lie)
    with pytest.raises(RunError, match=r"variates: the change of .* does not follow"):
        simulate(config, tmp_path / "run", engine=EngineSettings(cohort=1))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"optimizer": "adamw"}}, "'sgd', momentum 0"),
        ({"training": {"momentum": 0.9}}, "'sgd', momentum 0"),
        ({"training": {"schedule": "cosine"}}, "schedule 'constant'"),
        ({"training": {"proximal_mu": 0.1}}, "proximal_mu"),
        ({"privacy": {"unit": "example"}}, "second release"),
        ({"privacy": {"unit": "site", "noise_multiplier": 1.0}}, "second release"),
        *(({"aggregation": {"method": name}}, "same coordinates") for name in ("flora", "fedsvd", "rolora", "hetlora")),
        ({"aggregation": {"robust": "median"}}, "bad sites"),
        ({"aggregation": {"norm_bound_of_median": 3.0}}, "as they come"),
        ({"aggregation": {"max_weight": 0.5, "weights": "examples"}}, "mean over all sites"),
        ({"communication": {"codec": "bf16"}}, "'fp32'"),
        ({"communication": {"down": "int8"}}, "'fp32'"),
        ({"communication": {"top_k": 0.1}}, "'fp32'"),
        ({"federation": {"late": "carry"}}, "count in their round"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_config: Callable[..., RunConfig], sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        scaffold(make_config, **sections)
    scaffold(make_config, on=False, **sections)


@pytest.mark.parametrize("method", ["ffa_lora", "fedsa_lora", "fed_sb"])
def test_methods_whose_coordinates_stay_have_variates_of_what_they_send(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    config = scaffold(make_config, aggregation={"method": method}, federation={"rounds": 2})
    simulate(config, tmp_path / "run")
    checkpoint = load_checkpoint(RunFolder(tmp_path / "run").checkpoint)
    start = initial_adapter(resident_model(config), config.seed)
    assert checkpoint.controls.shared.keys() == sent_names(config, start)
    assert all(float(value.norm()) > 0 for value in checkpoint.controls.shared.values())


def test_a_site_that_lost_its_variate_refuses(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = scaffold(make_config)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=StopAfter(3))
    folder = RunFolder(tmp_path / "run")
    virtual_states(folder.sites).drop(load_checkpoint(folder.checkpoint).run)
    with pytest.raises(RunError, match="refused"):
        simulate(config, tmp_path / "run", resume=True)


def test_payload_of_another_round_trip_is_whole() -> None:
    """Names on the wire part into what they were."""
    update, variates = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    packed = load(save({**update, **marked(variates)}))
    assert all(same_bits(got, wanted) for got, wanted in zip(parted(packed), (update, variates), strict=True))


def test_correction_reaches_each_step(make_config: Callable[..., RunConfig]) -> None:
    """A constant correction moves a round's end by steps x rate x correction, where gradients hardly change."""
    config = scaffold(make_config, on=False, training={"lr": 1e-4})
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": SITES}, model)
    start = initial_adapter(model, config.seed)
    names = trained_names(config, start)
    plain = train_locally(model, site, config, start, names, 1, None).update
    ones = {name: torch.ones_like(start[name]) for name in names}
    moved = train_locally(model, site, config, start, names, 1, None, correction=ones).update
    for name in names:
        torch.testing.assert_close(moved[name] - plain[name], -4e-4 * ones[name], rtol=2e-2, atol=1e-7)
