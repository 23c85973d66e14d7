"""FedProx: the steps are those on the loss with the proximal term written out; DP or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from client.site import virtual_site
from client.training.loop import train_locally
from client.training.proximal import add_proximal_term
from common.config.run import RunConfig
from common.methods import trained_names
from common.models.adapter import initial_adapter
from common.models.resident import resident_model
from common.tensors import Tensors, l2_norm
from tests.mechanisms import mechanism_of


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_are_those_on_the_loss_with_the_term(kind: str) -> None:
    torch.manual_seed(0)
    target, start, mu = torch.randn(5), torch.randn(5), 0.7
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    hooked, written = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours, plain = make([hooked], lr=0.1), make([written], lr=0.1)
    add_proximal_term(ours, mu)
    for _ in range(6):
        for parameter, optimizer, extra in ((hooked, ours, 0.0), (written, plain, mu)):
            loss = (parameter - target).square().sum() + extra / 2 * (parameter - start).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(hooked.detach(), written.detach())


def update_of(make_config: Callable[..., RunConfig], mu: float, private: bool) -> Tensors:
    config = make_config(
        training={"optimizer": "sgd", "lr": 0.5, "local_steps": 8, "proximal_mu": mu},
        privacy={"unit": "example" if private else "none"},
    )
    model = resident_model(config)
    site = virtual_site(config, {"partition-id": 0, "num-partitions": 3}, model)
    start = initial_adapter(model, config.seed)
    rule = mechanism_of(clip=1.0, noise=1e-6, expected=4.0, steps=8, rate=0.5) if private else None
    return train_locally(model, site, config, start, trained_names(config, start), 1, rule).update


@pytest.mark.parametrize("private", [False, True], ids=["no DP", "DP"])
def test_stronger_term_holds_the_site_nearer_to_what_it_received(
    make_config: Callable[..., RunConfig], private: bool
) -> None:
    norms = [l2_norm(update_of(make_config, mu, private)) for mu in (0.0, 0.3, 1.0)]
    assert norms[0] > norms[1] > norms[2] > 0
