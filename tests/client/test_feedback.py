"""Top-k with error feedback: what is left out is sent later, and a round asked for again sends the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.feedback import RESIDUAL, packed_update
from client.personal import PersonalStore
from client.site import Site
from client.state import SiteStates
from common.codecs.codec import decode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import ConfigError, RunError
from common.randomness import KeyedRandomness
from common.tensors import Tensors, add, manifest_of, subtract
from common.wire import TrainRequest

RUN, OTHER = "0" * 32, "1" * 32


def update_of(number: int) -> Tensors:
    torch.manual_seed(number)
    return {"x.lora_A.weight": torch.randn(4, 9), "x.lora_B.weight": torch.randn(20, 4) * 1e-3}


def request(number: int, run: str = RUN) -> TrainRequest:
    return TrainRequest(
        config_digest="a" * 64, run=run, round=number, nonce="b" * 32, base_fingerprint="c" * 64
    )  # fmt: skip


def site_in(folder: Path) -> Site:
    return Site(
        "site 0", (), (), KeyedRandomness(0, "site 0"), personal=PersonalStore(SiteStates(folder / "s.db"), "site 0")
    )


def residual(site: Site, before: int, run: str = RUN) -> Tensors | None:
    assert site.personal is not None
    return site.personal.states.before(run, site.name, RESIDUAL, before)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_what_was_sent_and_what_is_left_add_up_to_all_updates(
    make_config: Callable[..., RunConfig], tmp_path: Path, codec: str
) -> None:
    config, site = make_config(communication={"codec": codec, "top_k": 0.2}), site_in(tmp_path)
    packing = Packing.of_update(config.communication)
    total, sent = update_of(1), update_of(1)
    total = {name: torch.zeros_like(value) for name, value in total.items()}
    sent = dict(total)
    for number in range(1, 9):
        update = update_of(number)
        payload = packed_update(update, request(number), site, config)
        total, sent = add(total, update), add(sent, decode(payload, manifest_of(update), packing))
    left = residual(site, 9)
    assert left is not None
    for name, value in subtract(total, sent).items():
        torch.testing.assert_close(left[name], value, rtol=1e-5, atol=1e-5)
        assert float(left[name].abs().max()) > 0


def test_round_asked_for_again_sends_the_same_bits(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config, site = make_config(communication={"codec": "int4", "top_k": 0.2}), site_in(tmp_path)
    rounds = (1, 2, 2, 3, 3, 3)
    sent = [packed_update(update_of(number), request(number), site, config) for number in rounds]
    assert sent[1] == sent[2]
    assert sent[3] == sent[4] == sent[5]
    assert packed_update(update_of(2), request(2, OTHER), site, config) != sent[1]


def test_without_top_k_nothing_is_kept_and_the_rounding_is_the_sites_own(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, site = make_config(communication={"codec": "int8"}), site_in(tmp_path)
    first = packed_update(update_of(1), request(1), site, config)
    assert residual(site, 2) is None
    assert first == packed_update(update_of(1), request(1, OTHER), replace(site, personal=None), config)
    assert first != packed_update(update_of(1), request(2), site, config)
    assert first != packed_update(update_of(1), request(1), replace(site, name="site 1"), config)


def test_update_that_is_not_finite_leaves_the_residual_as_it_was(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, site = make_config(communication={"top_k": 0.2}), site_in(tmp_path)
    packed_update(update_of(1), request(1), site, config)
    kept = residual(site, 2)
    packed_update({name: value * torch.inf for name, value in update_of(2).items()}, request(2), site, config)
    after = residual(site, 3)
    assert kept is not None
    assert after is not None
    assert all(torch.equal(kept[name], after[name]) for name in kept)


def test_site_without_a_place_or_with_another_runs_residual_refuses(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, site = make_config(communication={"top_k": 0.2}), site_in(tmp_path)
    with pytest.raises(ConfigError, match="has no place for it; expected fedtune-sim, or a real site"):
        packed_update(update_of(1), request(1), replace(site, personal=None), config)
    packed_update(update_of(1), request(1), site, config)
    with pytest.raises(RunError, match="residual holds other tensors"):
        packed_update({"x": torch.ones(3)}, request(2), site, config)
