"""A trial on the site itself: base model, device, self-test and one training step that leaves nothing behind.

The step goes through the code of a real round on the site's own rows, without ledger and release: what it trained is
dropped, nothing is written, nothing is charged because nothing leaves.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from client.agreement import agreed_config
from client.checks.finding import Finding
from client.policy.rules import expect_base, expect_size
from client.policy.section import Policy
from client.site import real_site
from client.site_config import SiteConfig
from client.start_check import self_test
from client.training.loop import train_locally
from common.config.adapter import AdapterConfig
from common.config.run import RunConfig
from common.config.yaml_text import parse_value
from common.methods import expect_rank, trained_names
from common.models.adapter import AdaptedModel, initial_adapter
from common.models.base import choose_device
from common.models.resident import resident_model
from common.privacy.planning import plan_mechanism

_ROWS_IN_A_STEP, _TOKENS = 8, 32
_LEAST_FREE = 2.0
"""Times the weights that memory should hold free: activations and gradients come beside them."""


def trial_run(site_config: SiteConfig, num_units: int) -> RunConfig:
    """Return a run config of one DP step on the site's rows, as its policy would allow it.

    Args:
        site_config: the site's.
        num_units: its records, or persons for a budget of unit user.
    """
    rows, policy = site_config.rows, site_config.policy
    adapter: dict[str, str | int] = {"kind": policy.adapters[0]}
    if adapter["kind"] == "head_only" and rows.task != "classification":
        adapter = {"kind": "lora"}
    if site_config.max_rank is not None and adapter["kind"] == "lora":
        adapter["rank"] = min(site_config.max_rank, AdapterConfig().rank)
    return RunConfig.model_validate(
        {
            "name": "trial",
            "model": {"source": site_config.model},
            "adapter": adapter,
            "data": {**rows.model_dump(), "train": site_config.data, "person_field": site_config.person_field,
                     "max_length": _TOKENS},
            "training": {"local_steps": 1},
            "privacy": {
                "unit": site_config.budget.unit, "noise_multiplier": 1.0, "accountant": "rdp",
                "delta": min(1e-5, 0.1 / num_units), "sample_rate": min(1.0, _ROWS_IN_A_STEP / num_units),
            },
            "federation": {"rounds": 1},
        }
    )  # fmt: skip


class Trial:
    """Checks that share one loaded model.

    Args:
        site_config: the site's.
        config: the run config to try; see :func:`trial_run`.
        own: whether ``config`` is ours and not a coordinator's, so that the policy does not apply to it.
    """

    def __init__(self, site_config: SiteConfig, config: RunConfig, *, own: bool) -> None:
        self._policy = site_config.policy
        self._site_config = site_config.model_copy(update={"policy": Policy()}) if own else site_config
        self._config = config

    def model(self) -> Finding:
        """Load the base model and compare its fingerprint with the policy."""
        model = self._load()
        expect_base(self._policy, model)
        allowed = bool(self._policy.base_models)
        return Finding(
            "base model", "pass" if allowed else "note", f"SHA-256 {model.base.fingerprint}",
            "" if allowed else "Compare it with the coordinator's, and set it in policy.base_models.",
        )  # fmt: skip

    def device(self) -> Finding:
        """Look at the device and its free memory."""
        device = choose_device(self._site_config.device)
        model = self._load()
        weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
        free = _free_bytes(device)
        found = f"{device}, weights {weights / 1e9:.2f} GB"
        if free is None:
            return Finding("device", "note", found, "How much memory is free is not known here.")
        found += f", {free / 1e9:.1f} GB free"
        if free < _LEAST_FREE * weights:
            return Finding("device", "note", found, "Little is left for training: set max_rank, or use another device.")
        return Finding("device", "pass", found)

    def self_test(self) -> str:
        """Run the site's self-test of DP-SGD on random tokens."""
        return f"passed in {self_test(self._load(), self._config):.1f} s"

    def step(self) -> str:
        """Train one step on the site's own rows and drop it."""
        model, config = self._load(), self._config
        site = dataclasses.replace(real_site(config, self._site_config, model), ledger=None, policy=None, personal=None)
        mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
        start = initial_adapter(model, config.seed)
        names = trained_names(config, start, 1)
        began = time.perf_counter()
        trained = train_locally(model, site, config, start, names, 1, mechanism, None)
        return f"{trained.steps} step in {time.perf_counter() - began:.1f} s; dropped, nothing charged"

    def _load(self) -> AdaptedModel:
        own = self._site_config
        agreed = agreed_config(self._config, own)
        rank = expect_rank(agreed, own.max_rank, own.name)
        expect_size(own.policy, agreed)
        return resident_model(agreed, own.device, rank)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    value = parse_value(found[0][1]) if found else None
    return value * 1024 if isinstance(value, int) else None
