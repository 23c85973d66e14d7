"""Codecs through whole runs: bytes as sent, bits that repeat, methods, privacy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from common.codecs.codec import told_manifest
from common.codecs.compression import decompress
from common.codecs.packing import Packing
from common.codecs.refusal import wire_error
from common.config.run import RunConfig
from common.factors import A, B
from common.run_folder import RunFolder
from simulations.engines.settings import EngineSettings
from simulations.run import simulate
from tests.simulations.test_run import StopAfter

PACKINGS: dict[str, dict[str, Any]] = {
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8", "block": 16},
    "int4 in zstd": {"codec": "int4", "zstd": 3},
    "int4 both ways": {"codec": "int4", "down": "int4"},
    "top-k": {"codec": "fp32", "top_k": 0.25},
    "top-k of int4": {"codec": "int4", "top_k": 0.25, "zstd": 1},
}


class Payloads:
    """Keeps what passed, by node: payloads down and up of each round."""

    def __init__(self) -> None:
        self.of: dict[int, list[tuple[bytes, bytes]]] = {}

    def __call__(self, node: int, received: bytes, sent: bytes) -> None:
        if received and sent:
            self.of.setdefault(node, []).append((received, sent))


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", PACKINGS)
def test_resumed_run_ends_on_the_same_bits(make_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    config = make_config(communication=PACKINGS[name], federation={"rounds": 3})
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", observer=StopAfter(3))
    resumed = simulate(config, tmp_path / "cut", resume=True)
    first, second = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("metrics_after", "bytes_down", "bytes_up"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize("name", PACKINGS)
def test_ffa_never_sends_a_and_bytes_are_those_sent(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str
) -> None:
    config = make_config(communication=PACKINGS[name], aggregation={"method": "ffa_lora"})
    seen = Payloads()
    summary = simulate(config, tmp_path / "run", watch=seen)
    up, down = Packing.of_update(config.communication), Packing.of_adapter(config.communication)
    for site, exchanges in enumerate(seen.of.values()):
        for number, (received, sent) in enumerate(exchanges):
            for payload, packing, way in ((received, down, "bytes_down"), (sent, up, "bytes_up")):
                named = told_manifest(payload, packing)
                assert any(key.endswith(B) for key in named)
                assert not any(key.endswith(A) for key in named)
                assert 0 < summary[way][f"site {site}"][number] - len(payload) < 1000
    content = decompress(seen.of[1][0][1], 2**20, wire_error) if up.zstd else seen.of[1][0][1]
    assert not any(A in key for key in load(content))


@pytest.mark.parametrize("name", ["int8", "top-k of int4"])
def test_what_a_site_sends_does_not_depend_on_who_else_does_or_what_computes_it(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str
) -> None:
    found = []
    settings: list[tuple[dict[str, Any], EngineSettings]] = [
        ({}, EngineSettings(cohort=1)),
        ({"simulation": {"windows": [{"site": "site 0", "from_round": 99}]}}, EngineSettings(cohort=1)),
        ({}, EngineSettings(name="processes", workers=2, cohort=1)),
    ]
    for number, (sections, engine) in enumerate(settings):
        config = make_config(communication=PACKINGS[name], federation={"rounds": 1}, **sections)
        seen = Payloads()
        simulate(config, tmp_path / str(number), watch=seen, engine=engine)
        found.append(seen.of[max(seen.of)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "fedsvd", "fedsa_lora", "flexlora"])
def test_coarse_codecs_carry_every_kind_of_method(
    make_config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    """A correction travels as the adapter does; none of the sites is turned away, and the run learns as exactly."""
    losses = {}
    for codec in ("fp32", "int8"):
        config = make_config(communication={"codec": codec}, aggregation={"method": method}, federation={"rounds": 3})
        summary = simulate(config, tmp_path / codec)
        for record in RunFolder(tmp_path / codec).records():
            if record["kind"] == "round":
                assert {outcome["status"] for outcome in record["sites"].values()} == {"admitted"}
        losses[codec] = summary["metrics_after"]["test"]["overall"]["loss"]
    assert losses["int8"] == pytest.approx(losses["fp32"], abs=0.05)


@pytest.mark.parametrize("unit", ["example", "site"])
def test_codec_is_post_processing_and_costs_no_privacy(
    make_config: Callable[..., RunConfig], tmp_path: Path, unit: str
) -> None:
    privacy = {"unit": unit, "noise_multiplier": 1.0, "accountant": "rdp", "delta": 1e-3}
    claims = []
    for codec in ("fp32", "int4"):
        config = make_config(privacy=privacy, communication={"codec": codec})
        summary = simulate(config, tmp_path / codec)
        claims.append((summary["epsilon"], summary["privacy_claim"]))
    assert claims[0] == claims[1]
