"""What a review found about privacy, resuming and hostile peers, on whole runs and real steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from client.answers import answer_train
from client.dp.step import DpStep
from client.site import virtual_site
from client.training.loop import train_locally
from common.codecs.codec import encode
from common.config.run import RunConfig
from common.data.federated import load_federated_data
from common.errors import RunError, WireError
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.resident import resident_model
from common.privacy.planning import plain_steps
from common.randomness import CryptoStream
from common.tensors import Tensors, is_finite, l2_norm, subtract
from common.wire import MechanismReport, SiteDescription, TrainRequest, header_bytes
from server.cohort import admit_members
from simulations.check import check_run
from simulations.progress import LiveProgress, closing_tables
from simulations.run import simulate
from tests.mechanisms import mechanism_of

FINGERPRINT = "a" * 64
PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


def dp_sum(layer: torch.nn.Linear, rows: torch.Tensor, noise: float = 1e-12) -> torch.Tensor:
    """What a DP step with clip norm 1 subtracts from the weight of a layer whose output is the loss."""
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rule = mechanism_of(noise=noise)
    with DpStep(layer, {"weight": layer.weight}, optimizer, rule, CryptoStream(bytes(32)), batch_first=True) as step:
        step.micro_batch(layer(rows).sum(dim=1), 0)
        step.apply(0)
    return -layer.weight.detach().clone()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_example_with_an_unbounded_gradient_counts_as_nothing(value: float) -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    honest = dp_sum(layer, rows)
    poisoned = dp_sum(layer, torch.cat([rows, torch.full((1, 3), value)]))
    assert torch.isfinite(poisoned).all()
    assert float((poisoned - honest).norm()) <= 1.0 + 1e-5


def request_for(config: RunConfig, model: AdaptedModel, **changes: Any) -> bytes:
    known: dict[str, Any] = {
        "config_digest": config.digest(), "run": "0" * 32, "round": 1, "nonce": "0" * 32,
        "base_fingerprint": model.base.fingerprint,
    }  # fmt: skip
    return header_bytes(TrainRequest(**{**known, **changes}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_site_refuses_an_adapter_made_to_overflow(make_config: Callable[..., RunConfig], value: float) -> None:
    config = make_config(privacy=PRIVATE)
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    start = initial_adapter(model, config.seed)
    hostile = encode({name: torch.full_like(tensor, value) for name, tensor in start.items()}, "fp32")
    with pytest.raises(WireError, match="trained adapter"):
        answer_train(request_for(config, model), hostile, site, config, model)


@pytest.mark.parametrize(
    "changes", [{"round": 99}, {"config_digest": "b" * 64}, {"base_fingerprint": "b" * 64}], ids=lambda c: next(iter(c))
)
def test_site_refuses_a_request_that_is_not_for_its_run(
    make_config: Callable[..., RunConfig], changes: dict[str, Any]
) -> None:
    config = make_config()
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    with pytest.raises(WireError):
        answer_train(request_for(config, model, **changes), encode(model.state(), "fp32"), site, config, model)


def update_of(config: RunConfig, seed: int) -> Tensors:
    changed = config.model_copy(update={"seed": seed})
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    start = initial_adapter(model, 0)
    mechanism = mechanism_of(noise=1e-9, clip=0.1, expected=12.0, steps=2)
    return train_locally(model, site, changed, start, frozenset(start), 1, mechanism).update


def test_dropout_masks_under_dp_do_not_follow_from_the_runs_seed(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(privacy=PRIVATE, adapter={"dropout": 0.5})
    first, other = update_of(config, 0), update_of(config, 12345)
    assert l2_norm(subtract(first, other)) < 1e-6 * l2_norm(first)


def report_of(**changes: Any) -> MechanismReport:
    return MechanismReport(**{"noise_multiplier": 1.0, "sample_rate": 4 / 12, "steps": 3, **changes})


def described(mechanism: MechanismReport) -> dict[int, SiteDescription]:
    return {
        1: SiteDescription(
            site="one", base_fingerprint=FINGERPRINT, initial_fingerprint=FINGERPRINT, num_examples=None,
            mechanism=mechanism, seeded=True,
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("privacy", "changes", "rule"),
    [
        (PRIVATE, {"noise_multiplier": 1e-9}, "noise multiplier"),
        (PRIVATE, {"steps": 900}, "steps"),
        ({"unit": "example", "epsilon": 2.0, "accountant": "rdp"}, {"noise_multiplier": 0.3}, "would spend"),
        ({"unit": "example", "epsilon": 2.0}, {"noise_multiplier": 1e-9}, "would spend"),
    ],
)
def test_site_that_would_not_keep_the_budget_is_refused(
    make_config: Callable[..., RunConfig], privacy: dict[str, Any], changes: dict[str, Any], rule: str
) -> None:
    config = make_config(privacy=privacy)
    members, left_out = admit_members(described(report_of(**changes)), config, FINGERPRINT, FINGERPRINT)
    assert members == {}
    assert rule in left_out[1]


@pytest.mark.parametrize("name", ["a\u2028b", "a\nb", "", "x" * 129])
def test_odd_site_name_is_refused_on_the_wire(name: str) -> None:
    with pytest.raises(ValueError, match="site"):
        SiteDescription(
            site=name,
            base_fingerprint=FINGERPRINT,
            initial_fingerprint=FINGERPRINT,
            num_examples=1,
            mechanism=None,
            seeded=True,
        )


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_resume_without_the_rounds_that_epsilon_is_summed_from_is_refused(
    make_config: Callable[..., RunConfig], tmp_path: Path, damage: str
) -> None:
    config = make_config(privacy=PRIVATE)
    simulate(config, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    if damage == "missing":
        log.unlink()
    else:
        log.write_text("".join(line for line in lines if '"round": 1' not in line))
    with pytest.raises(RunError, match="lacks rounds"):
        simulate(config, tmp_path / "run", resume=True)


def test_finished_run_resumes_to_itself(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    first = simulate(config, tmp_path / "run")
    again = simulate(config, tmp_path / "run", resume=True)
    assert again["metrics_after"] == first["metrics_after"]
    assert again["rounds"] == first["rounds"]


def test_sites_computed_one_after_another_never_miss_a_deadline(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("server.transport.time.monotonic", lambda: float(next(clock)))
    config = make_config(federation={"round_timeout_s": 1.0, "join_timeout_s": 1.0, "min_sites": 3})
    assert simulate(config, tmp_path / "run")["rounds"] == 2


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 6), (0.5, 2), (0.1, 1)])
def test_check_and_run_agree_on_the_steps_of_local_epochs(
    make_config: Callable[..., RunConfig], tmp_path: Path, epochs: float, steps: int
) -> None:
    config = make_config(training={"batch_size": 5, "local_epochs": epochs}, federation={"rounds": 1})
    assert plain_steps(config, 12) == steps
    assert check_run(config)["sites"]["site 0"]["steps_per_round"] == steps


def test_diverged_training_ends_in_one_line(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(training={"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(RunError) as caught:
        simulate(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert is_finite(initial_adapter(resident_model(config), 0))


def test_lines_of_a_resumed_run_count_its_bytes_from_there_and_updates_of_earlier_rounds(
    make_config: Callable[..., RunConfig],
) -> None:
    console = Console(record=True, width=200)
    late = {"status": "admitted", "train_loss": 0.25}
    with LiveProgress(console) as progress:
        progress.run_started(make_config(), ["a", "b"], 2)
        progress.round_ended({"round": 3, "sites": {}, "carried": [late, late], "seconds": {"total": 1.0}}, None)
    shown = console.export_text()
    assert "0/0 sites · 2 asked in earlier rounds · training loss 0.250 · 0 B since it was resumed" in shown


def test_site_names_with_brackets_are_shown_as_they_are(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    train = Path(config.data.train)
    train.write_text(train.read_text().replace("site 1", "[/x] ward"))
    load_federated_data.cache_clear()
    console = Console(record=True, width=120)
    with LiveProgress(console) as progress:
        summary = simulate(config, tmp_path / "run", observer=progress)
    for table in closing_tables(summary, "classification"):
        console.print(table)
    assert "[/x] ward" in console.export_text()
